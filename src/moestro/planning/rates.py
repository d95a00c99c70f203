"""How fast a CPU computes packed weights, by format and by how many tokens meet them. Pure arithmetic.

    >>> curve = Curve("int8", ((1, 20.0), (16, 10.0)))
    >>> curve.seconds(10**9, 1), curve.seconds(10**9, 16)
    (0.05, 0.1)

With one token weights pass as fast as they are read; with many, as fast as they are multiplied. `machine/` measures it;
`assumed_rates` takes it from the class of a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .costs import seconds_per_gb
from .descriptor import Descriptor
from .expert_sizes import names_of_parts
from .formats import descriptor_named

MEASURED = ("bf16", "int8", "hqq4", "hqq3", "hqq2", "q4_k", "mxfp4")  # formats; others are taken from the nearest
COUNTS = (1, 4, 8, 32, 64, 256)  # tokens that each weight meets
NEURONS, WIDE_NEURONS = 1024, 4096  # of experts that are measured: those of OLMoE, and larger ones
WIDE_LEAST = 32  # tokens, from which on the width makes a difference
_LEAST_NEURONS = 512  # smaller experts are taken for such ones
_PLAIN = "bf16"  # what stays in torch is taken for this


@dataclass(frozen=True, slots=True)
class Curve:
    """One format. points: (tokens that each weight meets, GB/s of packed weights that pass), by rising tokens."""

    format: str
    points: tuple[tuple[int, float], ...]

    def seconds(self, n_bytes: float, tokens: float) -> float:
        """Seconds for so many bytes of weights, each met by so many tokens."""
        return n_bytes * seconds_per_gb(self.points, tokens) / 1e9

    def of(self, fmt: Descriptor) -> Curve:
        """What the CPU does with another format: bytes are read as fast, and multiplied as fast for each weight."""
        mine = descriptor_named(self.format).bits_per_weight
        ratio = fmt.bits_per_weight / mine
        least = 1 / self.points[0][1]  # seconds of a GB, read
        points = [(tokens, 1 / max(least, 1 / gbps / ratio if tokens > 1 else 0.0)) for tokens, gbps in self.points]
        return Curve(fmt.name, tuple(points))


@dataclass(frozen=True, slots=True)
class Rates:
    """What a CPU was measured to do, beside the few rates of `Costs`.

    experts, wide_experts, dense: of experts of `NEURONS` and of `WIDE_NEURONS`, and of other products, in each of some
        formats. With many tokens, what is done for each token of an expert weighs less in a wide one.
    attention_gbps: of the cache that a decoded token reads. attention_gflops: of a prompt's scores and weighted values.
    plain_attention_gbps, plain_attention_gflops: where attention is Transformers' own, in torch.
    step_us, layer_us, plain_layer_us: of a step, and of each layer of it, outside all of these: what Python, torch and
        small operations take; of a plain layer, where attention is Transformers' own.
    prompt_ns: nanoseconds of each token, layer and column of the hidden states of a prompt, outside of all of these.
    link_beside_cpu_gbps: of the link while the CPU reads; None without a link.
    """

    experts: tuple[Curve, ...]
    wide_experts: tuple[Curve, ...]
    dense: tuple[Curve, ...]
    attention_gbps: float
    attention_gflops: float
    plain_attention_gbps: float
    plain_attention_gflops: float
    step_us: float
    layer_us: float
    plain_layer_us: float
    prompt_ns: float
    link_beside_cpu_gbps: float | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Rates:
        """From the values of all fields, as `dataclasses.asdict` makes them and JSON keeps them."""
        values = {"wide_experts": values["experts"], **values}
        tables = {
            name: tuple(Curve(one["format"], tuple((n, gbps) for n, gbps in one["points"])) for one in values[name])
            for name in ("experts", "wide_experts", "dense")
        }
        return cls(**{**values, **tables})

    def expert_curve(self, name: str, neurons: int = NEURONS) -> Curve:
        """Of experts of so many neurons, in the format of that name, which may have a part for each matrix."""
        narrow, wide = _curve(self.experts, name), _curve(self.wide_experts, name)
        return narrow if neurons == NEURONS else _between(narrow, wide, max(neurons, _LEAST_NEURONS))

    def dense_curve(self, name: str | None) -> Curve:
        """Of products in the format of that name; None: in torch."""
        return _curve(self.dense, name or _PLAIN)


def filled_up(narrow: Iterable[Curve], wide: Iterable[Curve]) -> tuple[Curve, ...]:
    """Curves of wide experts, with all formats and points of narrow ones: theirs where wide ones have none."""
    own = {curve.format: dict(curve.points) for curve in wide}
    return tuple(
        Curve(one.format, tuple(sorted((dict(one.points) | own.get(one.format, {})).items()))) for one in narrow
    )


@cache
def _curve(curves: tuple[Curve, ...], name: str) -> Curve:
    """The curve of a format: its own, or that of the nearest that was measured."""
    found = next((curve for curve in curves if curve.format == name), None)
    if found is not None:
        return found
    parts = [descriptor_named(part) for part in names_of_parts(name)[:3]]
    down = max(parts, key=lambda part: part.bits_per_weight)
    if len({part.name for part in parts}) > 1:
        return _mean([_curve(curves, part.name) for part in parts], name)
    nearest = _nearest((curve.format for curve in curves), down)
    near = next(curve for curve in curves if curve.format == nearest)
    return near if near.format == down.name else near.of(down)


def measured_for(names: Iterable[str | None]) -> tuple[str, ...]:
    """Those of `MEASURED` that curves of formats of these names are taken from; None is what stays in torch."""
    parts = {part for name in names for part in names_of_parts(name or _PLAIN)[:3]}
    near = {part if part in MEASURED else _nearest(MEASURED, descriptor_named(part)) for part in parts}
    return tuple(name for name in MEASURED if name in near)


def _nearest(names: Iterable[str], to: Descriptor) -> str:
    return min(names, key=lambda name: _distance(descriptor_named(name), to))


def _distance(one: Descriptor, other: Descriptor) -> tuple[bool, float]:
    unlike = one.meets_integers != other.meets_integers
    return unlike, abs(one.bits_per_weight - other.bits_per_weight)


def _between(narrow: Curve, wide: Curve, neurons: int) -> Curve:
    """Of experts of so many neurons: a byte's time is that of its products, and a part that falls as neurons grow."""
    part = (1 / NEURONS - 1 / neurons) / (1 / NEURONS - 1 / WIDE_NEURONS)
    points = []
    for tokens in sorted({tokens for curve in (narrow, wide) for tokens, _ in curve.points}):
        one, other = (seconds_per_gb(curve.points, tokens) for curve in (narrow, wide))
        points.append((tokens, 1 / max(one + part * (other - one), min(one, other) / 2)))
    return Curve(narrow.format, tuple(points))


def _mean(curves: list[Curve], name: str) -> Curve:
    """Of matrices of one size in several formats, whose bytes differ."""
    bits = [descriptor_named(curve.format).bits_per_weight for curve in curves]
    points = []
    for tokens in sorted({tokens for curve in curves for tokens, _ in curve.points}):
        seconds = sum(of * seconds_per_gb(curve.points, tokens) for of, curve in zip(bits, curves, strict=True))
        points.append((tokens, sum(bits) / seconds))
    return Curve(name, tuple(points))


@dataclass(frozen=True, slots=True)
class DensePart:
    """Weights outside the experts that a step computes with, in one format; None of what stays in torch.

    is_head: of a prompt, only the last token meets them.
    """

    format: str | None
    n_bytes: int
    is_head: bool = False

    @property
    def weights(self) -> float:
        """How many there are, about."""
        return 8 * self.n_bytes / descriptor_named(self.format or _PLAIN).bits_per_weight


# Of the read limit with one token, and of the FMA rate with many: (bits of a weight at least, shares), as `moestro
# machine` has them on two cores with AVX-512 VNNI (docs/log.md). Codes are multiplied as integers, several at once.
_SHARES = ((16.0, 0.9, 0.54), (6.5, 0.82, 0.8), (4.0, 0.78, 0.77), (3.1, 0.61, 0.75), (0.0, 0.57, 0.53))
_ATTENTION_SHARES, _PLAIN_SHARES = (0.5, 0.4), (0.02, 0.1)
_STEP_US, _LAYER_US, _PLAIN_LAYER_US, _PROMPT_NS = 1500.0, 90.0, 1400.0, 24.0


@cache
def assumed_rates(cpu_gbps: float, cpu_gflops: float) -> Rates:
    """Rates of a CPU of which only these two are known, by shares of them that kernels reach on others."""
    curves = []
    for name in MEASURED:
        bits = descriptor_named(name).bits_per_weight
        _, read, compute = next(row for row in _SHARES if bits >= row[0])
        many = COUNTS[-1]
        computed = bits / 8 * cpu_gflops * compute / (2 * many)  # GB/s of weights
        points = [(count, min(read * cpu_gbps, computed * many / count)) for count in COUNTS]
        curves.append(Curve(name, tuple(points)))
    both = tuple(curves)
    return Rates(
        experts=both,
        wide_experts=both,
        dense=both,
        attention_gbps=_ATTENTION_SHARES[0] * cpu_gbps,
        attention_gflops=_ATTENTION_SHARES[1] * cpu_gflops,
        plain_attention_gbps=_PLAIN_SHARES[0] * cpu_gbps,
        plain_attention_gflops=_PLAIN_SHARES[1] * cpu_gflops,
        step_us=_STEP_US,
        layer_us=_LAYER_US,
        plain_layer_us=_PLAIN_LAYER_US,
        prompt_ns=_PROMPT_NS,
    )


def table_of(curves: tuple[Curve, ...]) -> dict[str, dict[str, float]]:
    """Curves as a file has them: format -> tokens -> GB/s."""
    return {curve.format: {str(tokens): gbps for tokens, gbps in curve.points} for curve in curves}


def curves_of(table: Mapping[str, Any]) -> tuple[Curve, ...]:
    """What `table_of` wrote.

    Raises:
        KeyError: no format of that name. ValueError, TypeError, AttributeError: no numbers above 0.
    """
    curves = []
    for name, rates in table.items():
        descriptor_named(name)
        points = tuple(sorted((int(tokens), float(gbps)) for tokens, gbps in rates.items()))
        if not points or points[0][0] < 1 or not all(0 < gbps < float("inf") for _, gbps in points):
            raise ValueError(name)
        curves.append(Curve(name, points))
    if not curves:
        raise ValueError("an empty table")
    return tuple(curves)
