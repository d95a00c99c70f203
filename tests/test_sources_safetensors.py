"""Quantized safetensors read through their source: each weight as the format's own writer gives it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import DEEPSEEK_V4, FAMILIES, Family, build_model
from moestro import load
from moestro.engine.families import FamilyLayout, expert_modules
from moestro.errors import CheckpointError, ModelError, MoestroError
from moestro.loading.sources import open_source
from raw_reader import AWQ_ORDER, read_raw

LARGE = {"hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 160, "num_hidden_layers": 2}
LARGE |= {"mlp_layer_types": ["dense", "sparse"]}
FAMILY = {
    name: Family(name, {"num_key_value_heads": 4, **LARGE} if "deepseek" in name else LARGE)
    for name in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "minimax_m2")
}

Write = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # a weight [R, K] -> its tensors, and what they stand for


def compressed(packed: str, **weights: Any) -> tuple[Write, dict[str, Any]]:
    """By compressed-tensors' own compressor of that name."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    args, compressor = scheme.weights, BaseCompressor.load_from_registry(packed)
    assert args is not None

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        group = args.group_size or weight.shape[1]
        split = weight.unflatten(1, (-1, group))
        low, high, extra = split.amin(-1), split.amax(-1), {}
        if packed == "nvfp4-pack-quantized":
            extra["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).reshape(1)
        factor = extra.get("weight_global_scale")
        scale, zero = calculate_qparams(low, high, args, global_scale=factor)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, **extra}
        if args.symmetric:
            del state["weight_zero_point"]
        done = compressor.compress(state, scheme)
        back = compressor.decompress(dict(done), scheme)["weight"]
        if args.type == "float" and args.num_bits == 4:  # the library's own steps, which end in bfloat16 otherwise
            codes = unpack_fp4_from_uint8(done["weight_packed"], *weight.shape, dtype=torch.float32)
            stored = done["weight_scale"]
            stored = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
            back = dequantize(x_q=codes, scale=stored, args=args, global_scale=factor, dtype=torch.float32)
        return {k: v.contiguous() for k, v in done.items()}, back.float()

    config = {
        "quant_method": "compressed-tensors",
        "format": packed,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return write, config


def compressed_in_act_order() -> tuple[Write, dict[str, Any]]:
    """As compressed-tensors wrote it before its version 0.20: codes in the file's order, groups in that of g_idx."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    inner, config = compressed("pack-quantized", **INT4)

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        g_idx = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) // 32
        order = g_idx.argsort(stable=True)
        parts, value = inner(weight[:, order].contiguous())
        codes = unpack_from_int32(parts["weight_packed"], 4, weight.shape)[:, order.argsort()]
        parts |= {"weight_packed": pack_to_int32(codes.contiguous(), 4), "weight_g_idx": g_idx.int()}
        return parts, value[:, order.argsort()]

    return write, config


def fp8(scale_dtype: torch.dtype, suffix: str = "weight_scale_inv") -> tuple[Write, dict[str, Any]]:
    """128 x 128 blocks, at the edges smaller ones."""

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        grid = (-(-rows // 128), -(-columns // 128))
        scale = torch.exp2(torch.randint(-9, -4, grid).float()).to(scale_dtype)
        spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, suffix: scale}, codes.float() * spread

    return write, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def powers(kind: str) -> tuple[Write, dict[str, Any]]:
    """MXFP8, or DeepSeek-V4's FP4 in int8 with e8m0 scales, both for 32 columns."""
    from raw_reader import E2M1

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = weight.unflatten(1, (-1, 32))
        byte = torch.randint(118, 128, groups.shape[:2]).to(torch.uint8)
        scale = torch.exp2(byte.float() - 127)[..., None]
        if kind == "mxfp8":
            codes = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            return {"weight": codes.flatten(1), "weight_scale_inv": byte}, (codes.float() * scale).flatten(1)
        code = torch.randint(0, 16, weight.shape)
        packed = (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
        value = (E2M1[code].unflatten(1, (-1, 32)) * scale).flatten(1)
        return {"weight": packed, "scale": byte.view(torch.float8_e8m0fnu)}, value

    return write, {"quant_method": "fp8", "weight_block_size": [1, 32]}


def _pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    codes = codes.long().movedim(dim, -1).unflatten(-1, (-1, 32 // bits))
    words = sum(codes[..., i] << bits * i for i in range(32 // bits))
    return ((words + 2**31) % 2**32 - 2**31).to(torch.int32).movedim(-1, dim).contiguous()


def gptq(
    bits: int = 4, group: int = 32, *, act_order: bool = False, sym: bool = True, v2: bool = False, seed: int = 0
) -> Any:
    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(columns + seed)  # gate and up see the same activations: one order
        order = torch.randperm(columns, generator=generator) if act_order else torch.arange(columns)
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = (torch.arange(columns) // group).int()
        codes = torch.randint(0, 1 << bits, (columns, rows))
        scales = (torch.rand(columns // group, rows) * 0.05).half()
        zeros = torch.full((columns // group, rows), 1 << bits - 1)
        zeros = zeros if sym else torch.randint(1, 1 << bits, zeros.shape)
        value = ((codes - zeros[g_idx.long()]) * scales[g_idx.long()].float()).T
        stored = {"qweight": _pack(codes, bits, 0), "qzeros": _pack(zeros - (0 if v2 else 1), bits, 1)}
        return stored | {"scales": scales, "g_idx": g_idx}, value

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": act_order}
    return write, config | {"checkpoint_format": "gptq_v2" if v2 else "gptq"}


def awq() -> tuple[Write, dict[str, Any]]:
    def pack(codes: Tensor) -> Tensor:
        shuffled = torch.empty_like(codes).unflatten(1, (-1, 8))
        shuffled[..., AWQ_ORDER] = codes.unflatten(1, (-1, 8))
        return _pack(shuffled.flatten(1), 4, 1)

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        codes, zeros = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (columns // 32, rows))
        scales = (torch.rand(columns // 32, rows) * 0.05).half()
        value = ((codes - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)).T
        return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, value

    return write, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def modelopt() -> tuple[Write, dict[str, Any]]:
    from raw_reader import E2M1

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        code, factor = torch.randint(0, 16, weight.shape), torch.tensor(0.0173)
        scale = (torch.rand(weight.shape[0], weight.shape[1] // 16) * 3).to(torch.float8_e4m3fn)
        packed = (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8)
        value = (E2M1[code].unflatten(1, (-1, 16)) * (scale.float() * factor)[..., None]).flatten(1)
        beside = {"weight_scale": scale, "weight_scale_2": factor, "input_scale": torch.tensor(1.0)}
        return {"weight": packed} | beside, value

    return write, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
KINDS: dict[str, Callable[[], tuple[Write, dict[str, Any]]]] = {
    "int4g32": lambda: compressed("pack-quantized", **INT4),
    "int4g32-asymmetric": lambda: compressed("pack-quantized", **(INT4 | {"symmetric": False})),
    "int4g32-act-order": compressed_in_act_order,
    "int8-channel": lambda: compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "int8-plain": lambda: compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "fp8-channel": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
    "nvfp4": lambda: compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    ),
    "mxfp4": lambda: compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, symmetric=True
    ),
    "fp8": lambda: fp8(torch.float32),
    "fp8-bf16": lambda: fp8(torch.bfloat16),
    "fp8-ue8m0": lambda: fp8(torch.float8_e8m0fnu, "scale"),
    "mxfp8": lambda: powers("mxfp8"),
    "fp4": lambda: powers("fp4"),
    "modelopt": modelopt,
    "gptq": gptq,
    "gptq-int8": lambda: gptq(8),
    "gptq-asymmetric-v2": lambda: gptq(sym=False, v2=True),
    "gptq-asymmetric": lambda: gptq(sym=False),
    "gptq-act-order": lambda: gptq(act_order=True),
    "awq": awq,
}
CASES = [("mixtral", kind) for kind in KINDS] + [
    ("qwen3_moe", "fp8-bf16"),
    ("qwen3_moe", "gptq-act-order"),
    ("olmoe", "int4g32"),
    ("olmoe", "awq"),
    ("deepseek_v3", "fp8"),
    ("deepseek_v3", "int4g32"),
    ("minimax_m2", "fp8"),
]


def write_checkpoint(
    folder: Path, family: Family, kind: str, writer_of: Callable[[str], Write] | None = None
) -> nn.Module:
    """Save a tiny model, quantize its linear layers but the router and head, and load what they stand for back.

    Args:
        writer_of: what writes the weight of that name; None for the kind's own.
    """
    model = build_model(family)
    model.save_pretrained(folder)
    write, config = KINDS[kind]()
    torch.manual_seed(3)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        quantized = name.endswith(".weight") and tensor.dim() == 2 and not name.startswith(("lm_head", "model.embed"))
        if quantized and tensor.shape[0] > 8 and tensor.shape[1] % 32 == 0 and tensor.shape[0] % 8 == 0:
            parts, values[name] = (writer_of(name) if writer_of else write)(tensors.pop(name))
            values[name] = values[name].contiguous()
            tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    assert values
    save_file(tensors, folder / "model.safetensors")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"quantization_config": config}))
    reference = folder / "reference"
    model.save_pretrained(reference)
    save_file(load_file(reference / "model.safetensors") | values, reference / "model.safetensors")
    return type(model).from_pretrained(reference, dtype=torch.float32)


def compare(folder: Path, expected: nn.Module, tolerance: float = 0.0) -> None:
    source = open_source(str(folder))
    config = source.config()
    assert getattr(config, "quantization_config", None) is None
    with torch.device("meta"):
        empty = type(expected)(config)
    weights = source.weights(empty)
    for name, module in expert_modules(expected).items():
        layout = FamilyLayout.of(name, module)
        for expert in range(layout.experts):
            found = weights.expert(name, expert)
            order = found.matrices["down"].columns
            for parameter in layout.parameters:
                for part, value in layout.parts(parameter, getattr(module, parameter).data[expert]).items():
                    if part.endswith("_bias"):
                        read = found.biases[part]
                    else:
                        one = found.matrices[part]
                        read = read_raw(one.raw, one.rows, one.columns)
                        value = value if one.columns is None else value[:, one.columns]
                    if order is not None and not part.startswith("down"):
                        value = value[order]
                    torch.testing.assert_close(read.float(), value.float(), rtol=tolerance, atol=0)
    state, seen = expected.state_dict(), set()
    for name, value in weights.dense():
        seen.add(name)
        floats = value
        if not isinstance(value, Tensor):
            back = None if value.columns is None else value.columns.argsort()
            floats = read_raw(value.raw, value.rows, value.columns)
            floats = floats if back is None else floats[:, back]
        torch.testing.assert_close(floats.float(), state[name].float(), rtol=tolerance, atol=0)
    tied = set(getattr(expected, "all_tied_weights_keys", None) or {})
    assert {name for name in state if not name.startswith(tuple(expert_modules(expected)))} <= seen | tied


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_quantized_checkpoints_read_as_their_writer_reads_them(family: str, kind: str, tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, FAMILY[family], kind)
    compare(tmp_path, expected, 2**-20 if kind in ("nvfp4", "modelopt") else 0)


@pytest.mark.sample(36)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_is_read_as_transformers_saves_it(family: Family, tmp_path: Path) -> None:
    model = build_model(family)
    model.save_pretrained(tmp_path)
    compare(tmp_path, model)


def test_gpt_oss_blocks_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = build_model(Family("gpt_oss", LARGE))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    for name in list(tensors):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            state[name].copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, tmp_path / "model.safetensors")
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"quantization_config": {"quant_method": "mxfp4"}}))
    compare(tmp_path, model)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | config))


def read_all(folder: Path, model: nn.Module) -> None:
    source = open_source(str(folder))
    source.config()
    weights = source.weights(model)
    for name, module in expert_modules(model).items():
        for expert in range(module.num_experts):
            weights.expert(name, expert)
    for _ in weights.dense():
        pass


W1 = "model.layers.1.block_sparse_moe.experts.3.w1."
Q = "model.layers.0.self_attn.q_proj."
BAD: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "an expert is missing": ("fp8", lambda t: t.pop(f"{W1}weight"), r"has no .*experts\.3\.w1.*; it is incomplete"),
    "a scale is missing": ("fp8", lambda t: t.pop(f"{W1}weight_scale_inv"), "float8_e4m3fn"),
    "scales of another shape": (
        "fp8",
        lambda t: t.update({f"{W1}weight_scale_inv": torch.ones(3, 3)}),
        r"is \[160, 96\] in FP8, but its scales are \[3, 3\]",
    ),
    "weights of another shape": (
        "fp8",
        lambda t: t.update({f"{W1}weight": t[f"{W1}weight"][:, :64]}),
        r"FP8 weights of \[160, 64\], where the model needs \[160, 96\]",
    ),
    "a shape that is not its own": (
        "int4g32",
        lambda t: t.update({f"{W1}weight_shape": torch.tensor([160, 64])}),
        r"says that it is \[160, 64\]",
    ),
    "groups of no size": (
        "int4g32",
        lambda t: t.update({f"{W1}weight_scale": torch.ones(160, 7)}),
        "no groups of 16, 32, 64 or 128",
    ),
    "groups that are not equal": (
        "gptq-act-order",
        lambda t: t.update({f"{W1}g_idx": torch.zeros(96, dtype=torch.int32)}),
        "groups are not of 32 columns each",
    ),
    "no scale for the tensor": ("modelopt", lambda t: t.pop(f"{W1}weight_scale_2"), "no single scale"),
    "a dense weight is missing": ("fp8", lambda t: t.pop("model.norm.weight"), "has no model.norm.weight"),
    "a dense weight of another shape": (
        "fp8",
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"is \[3\] in the checkpoint, but its config.json makes it \[96\]",
    ),
    "numbers as scales": (
        "mxfp8",
        lambda t: t.update({f"{W1}weight_scale_inv": torch.ones(160, 3)}),
        r"its scales are \[160, 3\]",
    ),
    "bitsandbytes": ("fp8", lambda t: t.update({f"{W1}weight.absmax": torch.ones(3)}), "is of bitsandbytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_together_is_one_line(case: str, tmp_path: Path) -> None:
    kind, change, match = BAD[case]
    model = write_checkpoint(tmp_path, FAMILY["mixtral"], kind)
    edit(tmp_path, change)
    with pytest.raises((CheckpointError, ModelError), match=match) as caught:
        read_all(tmp_path, model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"by bitsandbytes .*, which Moestro does not read; use",
        ),
        ({"quant_method": "eetq"}, "by EETQ"),
        ({"quant_method": "vptq"}, "by VPTQ"),
        ({"quant_method": "aqlm"}, "by AQLM"),
        ({"quant_method": "hqq"}, "by HQQ"),
        ({"quant_method": "quip_sharp"}, "by QuIP#"),
        ({"quant_method": "unheard_of"}, "by 'unheard_of'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "3-bit GPTQ"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in the order 'gemv'"),
    ],
)
def test_methods_that_are_not_read_are_named(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    build_model(Family("mixtral")).save_pretrained(tmp_path)
    edit(tmp_path, lambda _: None, quantization_config=config)
    with pytest.raises(ModelError, match=match):
        open_source(str(tmp_path))


def test_damaged_files_and_pickles_are_one_line(tmp_path: Path) -> None:
    model = build_model(Family("mixtral"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_all(tmp_path, model)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle; save the model as safetensors"):
        read_all(tmp_path, model)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        read_all(tmp_path, model)


@pytest.mark.parametrize(
    "changes",
    [{"n_group": 8, "topk_group": 4}, {"n_group": 3}, {"topk_group": 0}, {"topk_group": 3}, {"num_experts_per_tok": 9}],
)
def test_routing_that_cannot_be_is_refused(changes: dict[str, int], tmp_path: Path) -> None:
    """Two groups of four experts, of which one is chosen, otherwise; quantized or not."""
    for folder, quantization in ((tmp_path / "plain", None), (tmp_path / "fp8", KINDS["fp8"]()[1])):
        build_model(FAMILY["deepseek_v3"]).save_pretrained(folder)
        values = {**changes} if quantization is None else {**changes, "quantization_config": quantization}
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            MoestroError, match=r"chooses .* groups of its 8 experts|routes each token to 9 of 8 experts"
        ):
            load(str(folder), device="cpu")


STACKED = {"weight": "", "weight_scale_inv": "_scale_inv"}
STACKED |= {"weight_packed": "_packed", "weight_scale": "_scale", "weight_global_scale": "_global_scale"}


@pytest.mark.parametrize(("kind", "stacked"), [("fp8", True), ("fp8", False), ("nvfp4", True)])
def test_experts_of_a_fused_family_may_be_stored_one_by_one(kind: str, stacked: bool, tmp_path: Path) -> None:
    """As quantizers leave Qwen3.5, whose own checkpoints have them stacked; and stacked, quantized."""
    model = build_model(Family("qwen3_5_moe_text", LARGE | {"layer_types": ["linear_attention", "full_attention"]}))
    model.save_pretrained(tmp_path)
    write, config = KINDS[kind]()
    state = model.state_dict()

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        for name in [name for name in state if ".experts." in name]:
            parts = [(name, state[name])]
            if not stacked and "gate_up" in name:
                halves = state[name].chunk(2, 1)
                parts = [(name.replace("gate_up", half), halves[i]) for i, half in enumerate(("gate", "up"))]
            for key, part in parts:
                written = [write(matrix) for matrix in part]
                part.copy_(torch.stack([value for _, value in written]))
                if stacked:
                    for ending in written[0][0]:
                        tensors[f"{key}{STACKED[ending]}"] = torch.stack([one[ending] for one, _ in written])
                else:
                    for expert, (one, _) in enumerate(written):
                        stem = key.replace("experts.", f"experts.{expert}.")
                        tensors |= {f"{stem}.{ending}": tensor for ending, tensor in one.items()}

    edit(tmp_path, change, quantization_config=config)
    compare(tmp_path, model, 2**-20 if kind == "nvfp4" else 0)


def test_deepseek_v4_has_experts_in_fp4_and_the_rest_in_fp8(tmp_path: Path) -> None:
    """Under its own names, which have no "model." before them."""
    wide = {"hidden_size": 64, "moe_intermediate_size": 96}
    model = build_model(Family("deepseek_v4", DEEPSEEK_V4 | wide))
    model.save_pretrained(tmp_path)
    four, _ = KINDS["fp4"]()
    eight, config = KINDS["fp8-ue8m0"]()
    values: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        assert any(".ffn.experts.0.w1.weight" in name for name in tensors)
        for name in list(tensors):
            tensor = tensors.pop(name)
            values[name] = tensor
            parts = {"weight": tensor}
            if ".experts." in name or (".attn.wq" in name and name.endswith(".weight")):
                parts, values[name] = (four if ".experts." in name else eight)(tensor)
            stem = name.removeprefix("model.")
            if stem.endswith("weight"):
                tensors |= {stem.removesuffix("weight") + ending: part for ending, part in parts.items()}
            else:
                tensors[stem] = tensor

    edit(tmp_path, change, quantization_config=config)
    reference = tmp_path / "reference"
    model.save_pretrained(reference)
    save_file({name: value.contiguous() for name, value in values.items()}, reference / "model.safetensors")
    compare(tmp_path, type(model).from_pretrained(reference, dtype=torch.float32))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["fp8", "int4g32-asymmetric", "awq", "nvfp4"]))
    folder = tmp_path_factory.getbasetemp() / f"mutated-{kind}"
    if not folder.exists():
        folder.mkdir()
        model = write_checkpoint(folder, Family("mixtral", LARGE | {"num_hidden_layers": 1}), kind)
        torch.save(model, folder / "model.pt")
        (folder / "model.safetensors").rename(folder / "whole")
    model = torch.load(folder / "model.pt", weights_only=False)
    whole = bytearray((folder / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, 20000))] = data.draw(st.sampled_from(b'0123456789[],:"_.abFIU\x00\xff'))
    (folder / "model.safetensors").write_bytes(whole)
    with suppress(MoestroError):
        read_all(folder, model)
