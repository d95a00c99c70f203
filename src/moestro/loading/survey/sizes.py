"""How large a surveyed model is in memory once the options are applied: what `loading/build.py` would plan for.

Legend: R rows, K columns.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ...errors import ModelError, RequestError
from ...planning.contract import LayerSpec, ModelSpec
from ...planning.expert_sizes import expert_sizes_named
from ...planning.formats import FLOATS, descriptor_named, format_of_bits, head_bits
from ...planning.options import Options
from ...planning.plan import Formats
from ...planning.rates import DensePart
from ...planning.spelling import spelled
from .found import ITEM_BYTES, DenseWeight, ExpertLayer, Survey
from .roles import TOWER

_FLOAT_NAMES = frozenset(FLOATS.values())


@dataclass(frozen=True, slots=True)
class Sized:
    """A model's sizes. dense: what a step computes outside the experts; tokens are looked up in no part of it."""

    spec: ModelSpec
    formats: Formats
    dense: tuple[DensePart, ...]


def sized(found: Survey, options: Options, *, on_gpu: bool) -> Sized:
    """The sizes of a model with these options.

    Args:
        on_gpu: whether dense layers run on a GPU, where floats stay in torch.

    Raises:
        ModelError: bits were asked for, but the weights keep the form that they are stored in. RequestError: bits of
            dense layers that are not on the CPU.
    """
    bits = options.expert_bits or options.bits
    if found.stored and bits is not None and found.kind != "packed":
        raise ModelError(
            f"{found.model} is quantized already, and its experts keep their own bits; leave "
            f"{spelled('bits')} and {spelled('expert_bits')} out"
        )
    if on_gpu:
        for option, value in {"dense_bits": options.dense_bits, "head_bits": options.head_bits}.items():
            if value not in (None, 16):
                raise RequestError(
                    f"{spelled(option, value)} needs the dense layers on the CPU; use {spelled('device', 'cpu')}, "
                    "or leave it out"
                )
    experts = [_experts_format(found, layer, bits, on_gpu and options.device != "emulated") for layer in found.layers]
    layers = tuple(_layer(layer, name) for layer, name in zip(found.layers, experts, strict=True))
    kept = [(one, _dense_format(found, one, options, on_gpu)) for one in found.dense]
    dense_bytes = sum(_bytes(found, one, name) for one, name in kept)
    names: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    for one, name in kept:
        if name is not None:
            names[one.is_head][name] += _bytes(found, one, name)
    dense, head = ("+".join(name for name, _ in of.most_common()) or None for of in names)
    parts: Counter[tuple[str | None, bool]] = Counter()
    for one, name in kept:
        if not one.is_embedding and not TOWER.search(one.name):
            parts[name, one.is_head] += _bytes(found, one, name)
    spec = ModelSpec(layers, dense_bytes, sum(one.count for one in found.dense))
    computed = tuple(DensePart(name, n_bytes, is_head) for (name, is_head), n_bytes in parts.items())
    return Sized(spec, Formats(tuple(experts), dense, head), computed)


def _experts_format(found: Survey, layer: ExpertLayer, bits: int | None, on_gpu: bool) -> str:
    name = layer.format or format_of_bits(bits, found.dtype)
    if on_gpu and descriptor_named(name.split("@")[0].split("+")[0]).is_strided:
        raise ModelError(
            f"weights in HQQ's groups of rows ({name}) are computed by the CPU's kernels alone; use "
            f"{spelled('device', 'cpu')}"
        )
    return name


def _layer(layer: ExpertLayer, name: str) -> LayerSpec:
    sizes, shape = expert_sizes_named(name), layer.shape
    return LayerSpec(
        experts=layer.experts,
        neurons=shape.neurons,
        expert_bytes=sizes.expert_bytes(shape),
        splittable=not layer.post_norm,
        hidden=shape.hidden,
        block_bytes=sizes.block_bytes(shape),
        matrices=3 if shape.has_gate else 2,
        block=sizes.block,
        head_bytes=sizes.head_bytes(shape),
    )


def _dense_format(found: Survey, one: DenseWeight, options: Options, on_gpu: bool) -> str | None:
    """The format that a weight is packed in; None of one that stays in torch."""
    if one.size is None or not options.pack_dense:
        return None
    is_quantized = one.format is not None and one.format not in _FLOAT_NAMES
    if on_gpu:
        return one.format if is_quantized else None
    own_bits = options.head_bits if one.is_head else options.dense_bits
    if one.format is not None and (is_quantized or own_bits is None or found.kind == "packed"):
        name = one.format
    elif one.is_head:
        name = format_of_bits(head_bits(options.bits, options.head_bits), found.dtype)
    else:
        name = format_of_bits(options.dense_bits or options.bits, found.dtype)
    return None if one.is_embedding and name in _FLOAT_NAMES else name


def _bytes(found: Survey, one: DenseWeight, name: str | None) -> int:
    if name is None or one.size is None:
        return one.count * (one.item_bytes or ITEM_BYTES[found.dtype])
    return descriptor_named(name).matrix_bytes(*one.size)
