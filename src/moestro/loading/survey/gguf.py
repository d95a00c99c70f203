"""The weights of GGUF files by their headers, as `loading/sources/gguf.py` takes them.

Legend: E experts, R rows, K columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError, ModelError
from ...planning.budget import format_bytes
from ...planning.expert_sizes import ExpertShape
from ...planning.formats import descriptor_named
from ...planning.spelling import spelled
from ..gguf_header import TRANSCODED
from ..headers import TensorHeader
from .found import DenseWeight, ExpertLayer

FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_STACK = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")
_ONE = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.(weight|bias)")
_JOINED = re.compile(r"attn_[kv]_b\.weight$")
_JOINED_SHARED = re.compile(r"ffn_(gate|up)_shexp\.weight$")


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The numbers of a small tensor, which a header does not hold."""

    def tolist(self) -> list[float]:
        """None of them is needed for sizes."""
        return []


@dataclass(frozen=True, slots=True)
class Shaped:
    """A tensor of which the header alone is known."""

    shape: tuple[int, ...]
    data: _Numbers = _Numbers()  # it holds nothing


@dataclass(frozen=True, slots=True)
class GgufHeaders:
    """What `gguf_values` reads of a file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Shaped]


def sort_out_gguf(
    model: str, tensors: Iterable[TensorHeader], architecture: str, depth: int, transcode: bool
) -> tuple[tuple[ExpertLayer, ...], tuple[DenseWeight, ...]]:
    """Tell experts from the rest.

    Args:
        depth: layers of the model; what the file has beyond predicts several tokens at once.
        transcode: whether types that nothing here keeps become int8.

    Raises:
        ModelError: a type that is not kept. CheckpointError: parts of experts are not there.
    """
    layers: dict[int, dict[str, TensorHeader]] = {}
    counts: dict[int, int] = {}
    dense: list[DenseWeight] = []
    for tensor in tensors:
        number = re.match(r"blk\.(\d+)\.", tensor.name)
        if number is not None and int(number[1]) >= depth:
            continue
        if (found := _STACK.fullmatch(tensor.name)) is not None:
            layers.setdefault(int(found[1]), {})[f"{found[2]}.{found[3]}"] = tensor
            counts[int(found[1])] = tensor.shape[0]
        elif (found := _ONE.fullmatch(tensor.name)) is not None:
            layers.setdefault(int(found[1]), {})[f"{found[2]}.{found[4]}"] = tensor
            counts[int(found[1])] = max(counts.get(int(found[1]), 0), int(found[3]) + 1)
        elif not tensor.name.endswith(".scale"):
            dense.append(_dense(model, tensor, architecture, transcode))
    if not layers:
        raise ModelError(f"the file holds a dense model ({architecture}): there are no experts to conduct")
    if not any(one.is_head and not one.is_embedding for one in dense):
        dense = [_tied(one) for one in dense]
    return tuple(_layer(model, counts[n], layers[n], transcode) for n in sorted(layers)), tuple(dense)


def _tied(one: DenseWeight) -> DenseWeight:
    return DenseWeight(one.name, one.count, one.size, one.item_bytes, one.format, one.is_head)


def _layer(model: str, experts: int, parts: Mapping[str, TensorHeader], transcode: bool) -> ExpertLayer:
    up, down = parts.get("up.weight", parts.get("gate_up.weight")), parts.get("down.weight")
    if up is None or down is None:
        raise CheckpointError(f"{model}: a layer has {', '.join(sorted(parts))} of its experts alone; it is incomplete")
    gate = parts.get("gate.weight", parts.get("gate_up.weight"))
    hidden, neurons = down.shape[-2:]
    names = [_format(model, one, transcode) for one in (gate or up, up, down)]
    shape = ExpertShape(hidden, neurons, gate is not None, "down.bias" in parts)
    return ExpertLayer(experts, shape, names[0] if len({*names}) == 1 else "+".join(names))


def _dense(model: str, tensor: TensorHeader, architecture: str, transcode: bool) -> DenseWeight:
    is_embedding, is_head = tensor.name == "token_embd.weight", tensor.name in ("token_embd.weight", "output.weight")
    packs = (
        len(tensor.shape) >= 2 and tensor.name.endswith(".weight") and not tensor.name.endswith("ffn_gate_inp.weight")
    )
    rows = math.prod(tensor.shape[:-1])
    size = (rows, tensor.shape[-1]) if packs else None
    kind = _format(model, tensor, transcode)
    if _JOINED.search(tensor.name) or (architecture == "granitemoe" and _JOINED_SHARED.search(tensor.name)):
        kind = "fp32"  # parts of one matrix here, which is joined in float32
        if tensor.name.endswith("k_b.weight"):  # it is transposed within a head
            size = (tensor.shape[0] * tensor.shape[2], tensor.shape[1])
    if "shexp" in tensor.name and len(tensor.shape) == 1:  # qwen2moe's gate has lost its dimension of 1
        size = (1, tensor.shape[0])
    return DenseWeight(tensor.name, math.prod(tensor.shape), size, 0, kind, is_head, is_embedding)


def _format(model: str, tensor: TensorHeader, transcode: bool) -> str:
    if tensor.dtype in FLOATS:
        return FLOATS[tensor.dtype]
    if tensor.dtype in TRANSCODED:
        if transcode:
            return "int8"
        raise ModelError(
            f"{model}: {tensor.name} is of type {tensor.dtype}, which is not kept; {spelled('transcode', 8)} "
            f"rounds such weights to 8 bits ({format_bytes(math.prod(tensor.shape) * 1.03)} of it)"
        )
    try:
        return descriptor_named(tensor.dtype.lower()).name
    except KeyError:
        raise ModelError(f"{model}: {tensor.name} is of type {tensor.dtype}, which Moestro does not read") from None
