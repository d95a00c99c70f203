"""Checkpoints as mixtral-offloading published its own: HQQ with axis 0, by hqq's quantizer and under its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import Family, build_model


class Kind(NamedTuple):
    """How a matrix is quantized: rows of a group, and scales of a super-group."""

    bits: int
    group: int
    super_group: int


EXPERTS, ATTENTION = Kind(2, 16, 128), Kind(4, 64, 256)  # as published
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
FAMILY = Family("mixtral", SIZES)


def quantize(weight: Tensor, kind: Kind) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix's tensors, and what hqq makes of them in float32."""
    W_q, meta = Quantizer.quantize(
        weight, nbits=kind.bits, group_size=kind.group, axis=0, round_zero=kind.bits == 4, optimize=False, device="cpu"
    )
    found, byte = {"W_q": W_q}, {"nbits": 8, "axis": 0, "optimize": False, "device": "cpu"}
    for name, own in (
        ("scale", {"group_size": kind.super_group}),
        ("zero", {"channel_wise": False, "group_size": None}),
    ):
        codes, of = Quantizer.quantize(meta[name], **byte, **own)
        for one in ("scale", "zero"):
            found[f"meta.meta_{name}.{one}"] = of[one].half()
            of[one] = of[one].half().float()
        found[f"meta.{name}_q"] = codes
        meta[name] = Quantizer.dequantize(codes, {**of, "compute_dtype": torch.float32})
    return found, Quantizer.dequantize(W_q, {**meta, "compute_dtype": torch.float32})


def write_checkpoint(
    folder: Path,
    *,
    family: Family = FAMILY,
    experts: Kind = EXPERTS,
    attention: Kind = ATTENTION,
    relative: bool = True,
) -> nn.Module:
    """Save a small Mixtral in this form, a file for each expert, and load what its tensors stand for.

    Args:
        relative: whether names in an expert's file leave out what the index has before them.
    """
    model, reference = build_model(family), folder / "reference"
    model.save_pretrained(folder)
    model.save_pretrained(reference)
    plain = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    trunk, of_experts, values = dict[str, Tensor](), dict[str, dict[str, Tensor]](), {}
    for name, tensor in plain.items():
        base = name.removesuffix(".weight")
        before, is_expert, last = base.partition(".experts.")
        if not is_expert and "self_attn" not in base:
            trunk[name] = tensor.half() if tensor.is_floating_point() else tensor
            values[name] = trunk[name].float()
            continue
        parts, values[name] = quantize(tensor, experts if is_expert else attention)
        if not is_expert:
            trunk |= {f"{base}.{ending}": part for ending, part in parts.items()}
            continue
        number, _, matrix = last.partition(".")
        names = {f"{matrix}.{ending}": part for ending, part in parts.items()}
        of_experts.setdefault(f"{before}.experts.{number}.", {}).update(names)
    write_files(folder, trunk, of_experts, relative=relative)
    save_file({name: value.contiguous() for name, value in values.items()}, reference / "model.safetensors")
    return type(model).from_pretrained(reference, dtype=torch.float32)


def write_files(
    folder: Path, trunk: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], *, relative: bool
) -> None:
    """The trunk's file, one for each expert, and the index of all."""
    places: dict[str, Any] = dict.fromkeys(trunk, "model.safetensors-trunk.safetensors")
    save_file(trunk, folder / "model.safetensors-trunk.safetensors")
    for count, (prefix, tensors) in enumerate(experts.items()):
        file = f"model-{count:05}.safetensors"
        save_file(
            {("" if relative else prefix) + name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / file,
        )
        places |= {f"{prefix}{name}": file for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
