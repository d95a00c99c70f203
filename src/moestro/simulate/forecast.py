"""How fast a planned model will be, by arithmetic on bytes, operations and a machine's rates. No weights, no trace.

A decode step's time is what the policy's own arithmetic allows (`Policy.bound`) for a step with the expected hits, the
dense part before it, and a fixed time a layer. A kernel reaches a share of the read limit that depends on how many bits
a weight has; these shares are of benchmarks/results (docs/plan.md).

Legend: E experts of a layer, k of them chosen for a token, n tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, floor

from ..planning.contract import Costs, ModelSpec, Outcome, Phase, Policy, Step
from ..planning.costs import LayerSpec
from .virtual import dense_layer_s

PROMPT = 512  # tokens, of which the prefill's speed is told
WIDE, NARROW = (
    0.25,
    0.15,
)  # of the middle, either way: of rates that are assumed or of a data sheet, and of measured ones
_LAYER_S = 200e-6  # of a decoded token outside the kernels, on a CPU
_GPU_LAYER_S = 60e-6  # of one whose captured graphs are replayed: launches and one wait, assumed
_COMPUTE_SHARE = 0.8  # of the FMA rate that products of many tokens reach
# Share of the read limit at one token, by bits of a weight (scales included): measured, AVX-512 VNNI and AMX.
_SHARES = ((16.0, 0.92), (8.5, 0.85), (6.6, 0.81), (4.5, 0.76), (0.0, 0.70))
# Adaptive caches hit more often than their share of all experts: on the demo's routing, share ** 0.6.
_LOCALITY = 0.6
_ADAPTIVE = frozenset(("moestro", "lru", "lru-speculative", "bandwidth-split"))


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, a range."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Of the range."""
        return (self.low + self.high) / 2

    def rounded(self) -> list[float]:
        """Both ends with three digits."""
        return [float(f"{end:.3g}") for end in (self.low, self.high)]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Speeds, and what they stand on. bound_by: what takes most of a decoded token's time."""

    decode: Speed
    prefill: Speed
    hit_rate: float
    token_bytes: int
    bound_by: str


def forecast(
    spec: ModelSpec,
    policy: Policy,
    costs: Costs,
    *,
    top_k: int,
    slots: int,
    looked_up_bytes: int = 0,
    kv_bytes: int = 0,
    measured: bool = False,
) -> Forecast:
    """The speeds of a model whose experts a policy has placed.

    Args:
        slots: experts that are on the GPU at once. looked_up_bytes: of the embedding, of which a step reads a row.
        kv_bytes: of the cache that a step reads. measured: whether the rates were measured on this machine.
    """
    experts = sum(layer.experts for layer in spec.layers)
    share = slots / experts if experts else 0.0
    hits = share**_LOCALITY if policy.name in _ADAPTIVE and 0 < share < 1 else share
    reached = _with_shares(costs, spec)
    has_gpu = bool(costs.gpu_gbps)
    dense = replace(spec, dense_bytes=max(0, spec.dense_bytes - looked_up_bytes) + kv_bytes)
    dense_s = dense_layer_s(dense, reached, 1) * len(spec.layers)
    experts_s = _layers_s(spec, policy, reached, dense, top_k, 1, hits)
    fixed_s = len(spec.layers) * (_GPU_LAYER_S if has_gpu else _LAYER_S)
    token_s = experts_s + fixed_s
    many = replace(reached, cpu_gflops=costs.cpu_gflops and costs.cpu_gflops * _COMPUTE_SHARE)
    prompt_s = _layers_s(spec, policy, many, spec, top_k, PROMPT, share) + fixed_s
    spread = NARROW if measured else WIDE
    token_bytes = dense.dense_bytes + sum(min(top_k, layer.experts) * layer.expert_bytes for layer in spec.layers)
    parts = {"the dense part": dense_s, "experts": experts_s - dense_s, "fixed costs": fixed_s}
    return Forecast(
        _range(1 / token_s, spread),
        _range(PROMPT / prompt_s, spread),
        hits,
        token_bytes,
        max(parts, key=parts.__getitem__),
    )


def _range(middle: float, spread: float) -> Speed:
    return Speed(middle * (1 - spread), middle * (1 + spread))


def _with_shares(costs: Costs, spec: ModelSpec) -> Costs:
    """Rates that kernels reach at one token, by how many bits the experts have."""
    layer = max(spec.layers, key=lambda of: of.experts * of.expert_bytes)
    weights = layer.matrices * layer.neurons * layer.hidden
    bits = 8 * layer.expert_bytes / weights if weights else 16.0
    share = next(share for least, share in _SHARES if bits >= least)

    def reached(gbps: float | None) -> float | None:
        return gbps and gbps * share

    return replace(costs, cpu_gbps=reached(costs.cpu_gbps), cpu_beside_link_gbps=reached(costs.cpu_beside_link_gbps))


def _layers_s(
    spec: ModelSpec, policy: Policy, costs: Costs, dense: ModelSpec, top_k: int, tokens: int, hits: float
) -> float:
    """Seconds of a step of so many tokens: of its layers one after another, or of the link beside them."""
    dense_s = dense_layer_s(dense, costs, tokens)
    known: Mapping[LayerSpec, tuple[float, float]] = {}
    step_s = link_s = 0.0
    for number, layer in enumerate(spec.layers):
        if policy.name == "layer-split" or layer not in known:  # which asks for the layer's number
            known = {**known, layer: _layer_s(number, layer, policy, costs, dense_s, top_k, tokens, hits)}
        one_s, one_link_s = known[layer]
        step_s, link_s = step_s + one_s, link_s + one_link_s
    return max(step_s, link_s)


def _layer_s(
    number: int, layer: LayerSpec, policy: Policy, costs: Costs, dense_s: float, top_k: int, tokens: int, hits: float
) -> tuple[float, float]:
    """Seconds of a layer's steps and of the link, between those of the next lower and higher whole number of hits."""
    chosen = min(top_k, layer.experts)
    active = layer.experts * (1 - (1 - chosen / layer.experts) ** tokens)  # distinct ones, as if chosen at random
    count = max(chosen, min(layer.experts, round(active)))
    each = max(1, round(tokens * chosen / count))
    phase = Phase.DECODE if tokens == 1 else Phase.PREFILL
    step = Step(number, phase, dict.fromkeys(range(count), each), dict.fromkeys(range(count), 1.0))
    wanted = min(float(count), hits * count)

    def at(hit: int) -> tuple[float, float]:
        misses = tuple(range(hit, count))
        moved = len(misses) * layer.expert_bytes
        done = Outcome(number, phase, tuple(range(hit)), (), misses, 0, moved, 0.0, 0.0)
        found = policy.bound(step, done, costs, dense_s)
        return found.step_s, found.link_s

    low, high = at(floor(wanted)), at(ceil(wanted))
    part = wanted - floor(wanted)
    return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])
