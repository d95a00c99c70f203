"""A routing trace: what the routers of one model chose for one text, and what the next gates would have guessed.

    >>> trace.tokens(Phase.DECODE), trace.top_k
    (3, 2)

The file, version 1, is one line of JSON (the header), a line feed, and a zlib stream of little-endian columns:

    passes   uint8 phase (0 prefill, 1 decode), uint32 tokens
    layers   a count for each pass (uint16), then for each layer step: uint16 layer, uint16 active experts
    active   uint16 expert, uint32 tokens routed to it, float32 sum of their routing weights
    guesses  for each layer step and each of `lookahead` layers: uint16 count; then uint16 expert, uint16 score * 65535

The header has the model's name and shape (`spec`), the text's SHA-256 (null for random tokens), the router's top-k, and
how often each gate's rule gives its own layer's choice (`agreement`, null where a family has no gate that was found).
"""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..planning.contract import SCORE, LayerSpec, ModelSpec, Phase, Step

FORMAT, VERSION = "moestro-trace", 1
_COLUMNS = "BIHHHHIfHHH"  # see the module's docstring


@dataclass(frozen=True, slots=True)
class Pass:
    """One step of the model: what each MoE layer was asked, in order. A prefill begins a text or goes on with one."""

    phase: Phase
    tokens: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded run.

    top_k: experts a token. lookahead: for how many later layers gates guessed. agreement: for each layer, the share of
    its own choices that its gate's rule gives; None without a gate.
    """

    model: str
    spec: ModelSpec
    top_k: int
    text_sha256: str | None
    passes: Sequence[Pass]
    lookahead: int = 0
    agreement: tuple[float | None, ...] = field(default=())

    def steps(self, phase: Phase) -> Iterator[Step]:
        """All layer steps of a phase."""
        for found in self.passes:
            if found.phase is phase:
                yield from found.steps

    def tokens(self, phase: Phase) -> int:
        """Tokens that passed in a phase."""
        return sum(found.tokens for found in self.passes if found.phase is phase)

    def heat(self) -> dict[tuple[int, int], float]:
        """(layer, expert) -> tokens routed to it, over the whole trace: the profile that policies place by."""
        found: dict[tuple[int, int], float] = {}
        for one in self.passes:
            for step in one.steps:
                for expert, tokens in step.tokens.items():
                    found[step.layer, expert] = found.get((step.layer, expert), 0.0) + tokens
        return found

    def heat_for(self, spec: ModelSpec) -> dict[tuple[int, int], float]:
        """The profile for a model of that shape.

        Raises:
            RequestError: the trace is of another.
        """
        counts = [[layer.experts for layer in found.layers] for found in (self.spec, spec)]
        if counts[0] != counts[1]:
            raise RequestError(
                f"the profile is of {self.model}, {len(counts[0])} layers of {counts[0][0]} experts; this model has "
                f"{len(counts[1])} of {counts[1][0]}: record one with moestro trace"
            )
        return self.heat()

    def save(self, path: Path) -> None:
        """Write the trace."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "spec": asdict(self.spec),
            "top_k": self.top_k,
            "text_sha256": self.text_sha256,
            "lookahead": self.lookahead,
            "agreement": self.agreement,
        }
        columns = [array(code) for code in _COLUMNS]
        for one in self.passes:
            _append_pass(columns, one, self.lookahead)
        header["lengths"] = [len(column) for column in columns]
        if sys.byteorder == "big":
            for column in columns:
                column.byteswap()
        body = zlib.compress(b"".join(column.tobytes() for column in columns), level=6)
        path.write_bytes(json.dumps(header).encode() + b"\n" + body)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a trace.

        Raises:
            RequestError: no such file, no trace, another version, or a damaged one.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RequestError(f"the trace {path} cannot be read: {error.strerror}") from None
        head, _, body = data.partition(b"\n")
        try:
            header: dict[str, Any] = json.loads(head)
            found = header.get("format"), header.get("version")
        except (ValueError, AttributeError):
            found = (None, None)
        if found[0] != FORMAT:
            raise RequestError(f"{path} is no trace of Moestro's; make one with: moestro trace MODEL --text FILE -o T")
        if found[1] != VERSION:
            raise RequestError(
                f"{path} is a trace of version {found[1]}, but this is for version {VERSION}; record anew"
            )
        try:
            return _read(header, zlib.decompress(body))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, zlib.error) as error:
            raise RequestError(f"the trace {path} is damaged ({error}); record it anew") from None


def _append_pass(columns: list[array[Any]], one: Pass, lookahead: int) -> None:
    phases, tokens, counts, layers, actives, experts, routed, masses, guess_counts, guessed, scores = columns
    phases.append(one.phase is Phase.DECODE)
    tokens.append(one.tokens)
    counts.append(len(one.steps))
    for step in one.steps:
        layers.append(step.layer)
        actives.append(len(step.tokens))
        experts.extend(step.tokens)
        routed.extend(step.tokens.values())
        masses.extend(step.mass[expert] for expert in step.tokens)
        for ahead in range(1, lookahead + 1):
            guesses = step.guesses.get(step.layer + ahead, {})
            guess_counts.append(len(guesses))
            guessed.extend(guesses)
            scores.extend(min(SCORE, round(score * SCORE)) for score in guesses.values())


def _read(header: dict[str, Any], body: bytes) -> Trace:
    columns: list[array[Any]] = []
    at = 0
    for code, length in zip(_COLUMNS, header["lengths"], strict=True):
        column = array(code)
        end = at + length * column.itemsize
        column.frombytes(body[at:end])
        if len(column) != length:
            raise ValueError("it ends too early")
        if sys.byteorder == "big":
            column.byteswap()
        columns.append(column)
        at = end
    spec = header["spec"]
    layers = tuple(LayerSpec(**layer) for layer in spec.pop("layers"))
    lookahead = int(header["lookahead"])
    return Trace(
        model=str(header["model"]),
        spec=ModelSpec(layers, **spec),
        top_k=int(header["top_k"]),
        text_sha256=header["text_sha256"],
        passes=_read_passes(columns, lookahead, layers),
        lookahead=lookahead,
        agreement=tuple(header["agreement"]),
    )


def _read_passes(columns: list[array[Any]], lookahead: int, specs: Sequence[LayerSpec]) -> list[Pass]:
    phases, tokens, counts, layers, actives, experts, routed, masses, guess_counts, guessed, scores = columns
    passes: list[Pass] = []
    at_layer = at_active = at_guess = at_count = 0
    for is_decode, count_tokens, count in zip(phases, tokens, counts, strict=True):
        phase = Phase.DECODE if is_decode else Phase.PREFILL
        steps: list[Step] = []
        for _ in range(count):
            layer, active = layers[at_layer], actives[at_layer]
            at_layer += 1
            end = at_active + active
            chosen = experts[at_active:end]
            if chosen and max(chosen) >= specs[layer].experts:
                raise ValueError(f"expert {max(chosen)} of layer {layer}, which the model does not have")
            guesses: dict[int, dict[int, float]] = {}
            for ahead in range(1, lookahead + 1):
                stop = at_guess + guess_counts[at_count]
                at_count += 1
                if stop > at_guess and max(guessed[at_guess:stop]) >= specs[layer + ahead].experts:
                    raise ValueError(f"a guess of an expert that layer {layer + ahead} does not have")
                if stop > at_guess:
                    marks = (score / SCORE for score in scores[at_guess:stop])
                    guesses[layer + ahead] = dict(zip(guessed[at_guess:stop], marks, strict=True))
                at_guess = stop
            steps.append(
                Step(
                    layer,
                    phase,
                    dict(zip(chosen, routed[at_active:end], strict=True)),
                    dict(zip(chosen, masses[at_active:end], strict=True)),
                    guesses,
                )
            )
            at_active = end
        passes.append(Pass(phase, count_tokens, tuple(steps)))
    return passes
