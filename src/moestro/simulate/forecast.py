"""How fast a planned model will be, by arithmetic on bytes, operations and a machine's rates. No weights, no trace.

A decode step's time is what the policy's own arithmetic allows (`Policy.bound`) for a step with the expected hits, the
dense part before it, and a fixed time for the step and for each layer. How fast the CPU's kernels are depends on the
format and on how many tokens meet a weight (planning/rates.py).

Legend: E experts of a layer, k of them chosen for a token, n tokens of a prompt, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor

from ..planning.contract import Costs, ModelSpec, Outcome, Phase, Policy, Step
from ..planning.costs import LayerSpec
from ..planning.machines import Machine
from ..planning.rates import DensePart

PROMPT = 512  # tokens, of which the prefill's speed is told
# Of the middle, either way: of prefill and of rates that are assumed or of a data sheet; of decode by measured rates.
WIDE, NARROW = 0.25, 0.15
_GPU_LAYER_S = 60e-6  # of one whose captured graphs are replayed: launches and one wait, assumed
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


@dataclass(frozen=True, slots=True)
class Work:
    """What a model computes, beside what its spec says.

    formats: of each layer's experts. dense: the other weights. top_k: experts of a layer that each token is sent to.
    heads_width: numbers of all query heads of a layer together. attention_layers: those that have attention.
    is_plain: whether attention is Transformers' own on a CPU, for want of kernels for it.
    """

    formats: tuple[str, ...]
    dense: tuple[DensePart, ...]
    top_k: int
    heads_width: int = 0
    attention_layers: int = 0
    is_plain: bool = False


class StepModel:
    """Seconds of steps of a model whose experts a policy has placed.

    Args:
        slots: experts that are on the GPU at once.
    """

    def __init__(self, spec: ModelSpec, policy: Policy, machine: Machine, work: Work, slots: int) -> None:
        self.spec, self.policy, self.machine, self.work = spec, policy, machine, work
        self._rates, self._has_gpu = machine.cpu_rates, bool(machine.costs.gpu_gbps)
        experts = sum(layer.experts for layer in spec.layers)
        self._share = slots / experts if experts else 0.0
        self._costs: dict[tuple[str, int], Costs] = {}

    @property
    def hit_rate(self) -> float:
        """Of experts in decode, those that are on the GPU."""
        adapts = self.policy.name in _ADAPTIVE and 0 < self._share < 1
        return self._share**_LOCALITY if adapts else self._share

    def decode_parts(self, kv_bytes: float) -> dict[str, float]:
        """Seconds of a decoded token that reads so much of a cache, by what takes them."""
        dense_s = self._dense_s(1, kv_bytes)
        experts_s = self._layers_s(dense_s, 1, self.hit_rate) - dense_s
        return {"the dense part": dense_s, "experts": experts_s, "fixed costs": self._fixed_s}

    def decode_s(self, kv_bytes: float) -> float:
        """Seconds of a decoded token that reads so much of a cache."""
        return sum(self.decode_parts(kv_bytes).values())

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prompt."""
        dense_s = self._dense_s(tokens, 0.0) + self._prompt_attention_s(tokens)
        return self._layers_s(dense_s, tokens, self._share) + self._fixed_s + self._prompt_beside_s(tokens)

    def _prompt_beside_s(self, tokens: int) -> float:
        """Of a prompt's norms, sums and routing."""
        if self._has_gpu:
            return 0.0
        return self._rates.prompt_ns / 1e9 * tokens * sum(layer.hidden for layer in self.spec.layers)

    @cached_property
    def _fixed_s(self) -> float:
        count = len(self.spec.layers)
        if self._has_gpu:
            return count * _GPU_LAYER_S
        layer_us = self._rates.plain_layer_us if self.work.is_plain else self._rates.layer_us
        return (self._rates.step_us + count * layer_us) / 1e6

    def _dense_s(self, tokens: int, kv_bytes: float) -> float:
        """Of the dense part, all layers together; of a prompt only the last token meets the head."""
        costs, rates, total_s = self.machine.costs, self._rates, 0.0
        for part in self.work.dense:
            met = 1 if part.is_head else tokens
            if self._has_gpu:
                assert costs.gpu_gbps
                compute_s = 2 * part.weights * met / (costs.gpu_gflops * 1e9) if costs.gpu_gflops else 0.0
                total_s += max(part.n_bytes / (costs.gpu_gbps * 1e9), compute_s)
            else:
                total_s += rates.dense_curve(part.format).seconds(part.n_bytes, met)
        gbps = rates.plain_attention_gbps if self.work.is_plain else rates.attention_gbps
        return total_s + kv_bytes / ((costs.gpu_gbps if self._has_gpu else gbps) or gbps) / 1e9

    def _prompt_attention_s(self, tokens: int) -> float:
        """Scores and weighted values: of the tokens before each, or where all are made, of all."""
        operations = 2.0 * tokens * tokens * self.work.heads_width * self.work.attention_layers
        if self._has_gpu:
            gflops = self.machine.costs.gpu_gflops
            return operations / (gflops * 1e9) if gflops else 0.0
        if self.work.is_plain:
            return 2 * operations / self._rates.plain_attention_gflops / 1e9
        return operations / self._rates.attention_gflops / 1e9

    def _layers_s(self, dense_s: float, tokens: int, hits: float) -> float:
        """Seconds of a step of so many tokens: of its layers one after another, or of the link beside them."""
        each_s = dense_s / len(self.spec.layers)
        known: dict[tuple[LayerSpec, str], tuple[float, float]] = {}
        step_s = link_s = 0.0
        for number, (layer, name) in enumerate(zip(self.spec.layers, self.work.formats, strict=True)):
            if self.policy.name == "layer-split" or (layer, name) not in known:  # which asks for the layer's number
                known[layer, name] = self._layer_s(number, name, each_s, tokens, hits)
            one_s, one_link_s = known[layer, name]
            step_s, link_s = step_s + one_s, link_s + one_link_s
        return max(step_s, link_s)

    def _layer_s(self, number: int, name: str, dense_s: float, tokens: int, hits: float) -> tuple[float, float]:
        """Seconds of a layer's steps and of the link, between those of the next lower and higher whole hits."""
        layer = self.spec.layers[number]
        costs = self._costs_of(name, layer.neurons)
        chosen = min(self.work.top_k, layer.experts)
        active = layer.experts * (1 - (1 - chosen / layer.experts) ** tokens)  # distinct, as if chosen at random
        count = max(chosen, min(layer.experts, round(active)))
        each = max(1, round(tokens * chosen / count))
        phase = Phase.DECODE if tokens == 1 else Phase.PREFILL
        step = Step(number, phase, dict.fromkeys(range(count), each), dict.fromkeys(range(count), 1.0))
        wanted = min(float(count), hits * count)

        def at(hit: int) -> tuple[float, float]:
            misses = tuple(range(hit, count))
            moved = len(misses) * layer.expert_bytes
            done = Outcome(number, phase, tuple(range(hit)), (), misses, 0, moved, 0.0, 0.0)
            found = self.policy.bound(step, done, costs, dense_s)
            return found.step_s, found.link_s

        low, high = at(floor(wanted)), at(ceil(wanted))
        part = wanted - floor(wanted)
        return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])

    def _costs_of(self, name: str, neurons: int) -> Costs:
        """The machine's rates with those that the CPU's kernels reach in a format, with experts of so many neurons."""
        if (name, neurons) not in self._costs:
            costs, points = self.machine.costs, self._rates.expert_curve(name, neurons).points
            beside = costs.cpu_beside_link_gbps
            if beside and costs.cpu_gbps:
                beside *= points[0][1] / costs.cpu_gbps
            self._costs[name, neurons] = replace(
                costs, cpu_gbps=points[0][1], cpu_beside_link_gbps=beside, cpu_points=points
            )
        return self._costs[name, neurons]


def forecast(steps: StepModel, kv_bytes: float) -> Forecast:
    """The speeds of a model.

    Args:
        kv_bytes: of the cache that a decoded token reads.
    """
    parts, prompt_s = steps.decode_parts(kv_bytes), steps.prefill_s(PROMPT)
    spread = WIDE if steps.machine.rates is None else NARROW
    token_bytes = sum(part.n_bytes for part in steps.work.dense) + int(kv_bytes)
    token_bytes += sum(min(steps.work.top_k, layer.experts) * layer.expert_bytes for layer in steps.spec.layers)
    return Forecast(
        _range(1 / sum(parts.values()), spread),
        _range(PROMPT / prompt_s, WIDE),
        steps.hit_rate,
        token_bytes,
        max(parts, key=parts.__getitem__),
    )


def _range(middle: float, spread: float) -> Speed:
    return Speed(middle * (1 - spread), middle * (1 + spread))
