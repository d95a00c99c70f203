"""A trace at another model's size: experts of other bits, and few layers repeated to a deeper shape.

The rule: layer i of the deeper model chooses what layer i mod m of the recorded m layers chose, for the same token.
What its gates guess is what the recorded gates guessed; where the layer that is guessed at lies beyond the last
recorded one (a seam), its own choice is guessed with the same ranks right and wrong as in the last guess at that
distance of the same step. So popularity, reuse and recall are the recorded model's, sizes and depth the other's. A
model of other experts or top-k is refused: its routing cannot be known from this trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..errors import RequestError
from ..planning.contract import LayerSpec, ModelSpec, Step
from ..planning.expert_sizes import ExpertShape, expert_sizes_named
from ..planning.shapes import spec_of_shape, top_k_of_shape
from ..planning.spelling import spelled
from .trace import Pass, Trace

FORMAT_OF_BITS = {32: "fp32", 16: "bf16", 8: "int8", 4: "hqq4", 3: "hqq3", 2: "hqq2"}


def at_bits(spec: ModelSpec, bits: int | None) -> ModelSpec:
    """A model with experts of so many bits, as a load would pack them; None: of its own. The dense part stays as it is.

    Raises:
        RequestError: no such bits.
    """
    if bits is None:
        return spec
    if bits not in FORMAT_OF_BITS:
        raise RequestError(f"{spelled('bits', bits)}: there are {', '.join(map(str, FORMAT_OF_BITS))}")
    sizes = expert_sizes_named(FORMAT_OF_BITS[bits])

    def of(layer: LayerSpec) -> LayerSpec:
        shape = ExpertShape(layer.hidden, layer.neurons, has_gate=layer.matrices == 3)
        return replace(layer, expert_bytes=sizes.expert_bytes(shape), block_bytes=0, head_bytes=0)

    return replace(spec, layers=tuple(of(layer) for layer in spec.layers))


def resized(trace: Trace, shape: str | None, bits: int | None) -> Trace:
    """A trace at another shape's size, or with experts of other bits; as it is where nothing is asked."""
    found = trace if shape is None else as_shape(trace, shape)
    return replace(found, spec=at_bits(found.spec, bits))


def as_shape(trace: Trace, shape: str) -> Trace:
    """The trace as if a model of that shape, in bf16, had chosen so.

    Raises:
        RequestError: no such shape, or one with other experts or top-k.
    """
    spec, top_k = spec_of_shape(shape), top_k_of_shape(shape)
    recorded = {layer.experts for layer in trace.spec.layers}
    if recorded != {spec.layers[0].experts} or trace.top_k != top_k:
        raise RequestError(
            f"{shape} has {spec.layers[0].experts} experts, top-{top_k}, but the trace of {trace.model} has "
            f"{'/'.join(map(str, sorted(recorded)))}, top-{trace.top_k}; record one of a model with the same"
        )
    depth = len(spec.layers)
    passes = [
        replace(one, steps=tuple(_tiled(one, len(trace.spec.layers), depth, trace.lookahead, spec)))
        for one in trace.passes
    ]
    return replace(trace, model=f"{trace.model} as {shape}", spec=spec, passes=passes)


def _tiled(one: Pass, recorded: int, depth: int, lookahead: int, spec: ModelSpec) -> Iterator[Step]:
    steps = {step.layer: step for step in one.steps}
    for layer in range(depth):
        source = steps.get(layer % recorded)
        if source is None:
            continue
        guesses: dict[int, Mapping[int, float]] = {}
        for ahead in range(1, min(lookahead, depth - 1 - layer) + 1):
            found = source.guesses.get(source.layer + ahead)
            if found is None and source.layer + ahead >= recorded:
                found = _across_seam(steps, recorded, source.layer, ahead, spec.layers[0].experts)
            if found:
                guesses[layer + ahead] = found
        yield Step(layer, source.phase, source.tokens, source.mass, guesses)


def _across_seam(steps: Mapping[int, Step], recorded: int, layer: int, ahead: int, experts: int) -> dict[int, float]:
    """What a gate beyond the last recorded layer would guess: its own choice, as well as the last guess was."""
    last, guessing = steps.get(recorded - 1), steps.get(recorded - 1 - ahead)
    wanted = steps.get((layer + ahead) % recorded)
    if last is None or guessing is None or wanted is None or recorded - 1 not in guessing.guesses:
        return {}
    right = iter(sorted(wanted.tokens, key=lambda e: -wanted.mass[e]))
    wrong = (e for e in range(experts) if e not in wanted.tokens)
    found: dict[int, float] = {}
    for expert, score in guessing.guesses[recorded - 1].items():
        chosen = next(right if expert in last.tokens else wrong, None)
        if chosen is not None:
            found[chosen] = score
    return found
