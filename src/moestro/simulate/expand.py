"""Makes a trace of a few parameters: one that a router with these statistics could have left.

    >>> from moestro.simulate.routing import routing_of
    >>> expanded("mixtral-8x7b", routing_of("mixtral-8x7b").low, seed=1, tokens=4, prompt_tokens=2).tokens(Phase.DECODE)
    4

A gate's score of an expert is a sum of four normal parts: how much the layer likes the expert in any text, how much it
does in this text (which drifts over some 300 tokens), in these words (over two tokens), and noise of this token. Each
token takes the top k. The first part's size is solved so that the hottest quarter of experts has its share, that of
the second and third together so that as many experts are used again as wanted, `lasting` of it in the second. A guess
is the score with noise, more the farther ahead it is, whose size is solved for the recall. All are solved on the very
numbers that the trace is made of, so that a trace meets its parameters.

Legend: L layers, T tokens of a text, P texts, E experts of a layer, k chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..planning.contract import Phase, Step, guesses_kept
from ..planning.shapes import spec_of_shape, top_k_of_shape
from .reshape import resized
from .routing import Statistics, routing_of
from .trace import Pass, Trace

PIECE_TOKENS = 192  # of a text, to decode after its prompt
PROMPT_TOKENS = 64
LOOKAHEAD = 2  # layers that gates guess ahead
_DRIFT_TOKENS = 300.0  # over which what a text is about changes
_WORDS_TOKENS = 2.0
_SOLVED_LAYERS = 6  # that sizes are solved on: they hold for all, which are drawn alike
_ROUNDS, _HALVINGS = 4, 9

Scores = NDArray[np.float32]
Chosen = NDArray[np.bool_]


def expanded_ends(shape: str, bits: int | None, **pieces: int) -> Iterator[Trace]:
    """Traces at the lower and then at the higher end of what is known of how a shape routes.

    Args:
        bits: of the experts; None for bf16. pieces: lengths, as `expanded` takes them.

    Raises:
        RequestError: nothing is known of it.
    """
    routing = routing_of(shape)
    for statistics in (routing.low, routing.high):
        yield resized(expanded(shape, statistics, seed=routing.seed, **pieces), None, bits)


def expanded(
    shape: str,
    statistics: Statistics,
    *,
    seed: int,
    tokens: int,
    prompt_tokens: int = PROMPT_TOKENS,
    decode_tokens: int = PIECE_TOKENS,
) -> Trace:
    """A trace of a shape in bf16 with these statistics; equal arguments give an equal one.

    Args:
        tokens: to decode in all. prompt_tokens, decode_tokens: of each text.
    """
    spec, top_k = spec_of_shape(shape), top_k_of_shape(shape)
    pieces = -(-tokens // decode_tokens)
    length = prompt_tokens + min(decode_tokens, tokens)
    draws = _Draws.of(len(spec.layers), pieces, length, spec.layers[0].experts, seed, statistics.lasting)
    some = draws.first(_SOLVED_LAYERS)
    liking, topics = _solved_parts(some, statistics, top_k)
    blur = _solved_blur(some.scores(liking, topics), some.guessing, statistics.recall, top_k)
    random = np.random.default_rng(seed + 1)
    passes: list[Pass] = []
    for piece in range(pieces):
        left = min(decode_tokens, tokens - piece * decode_tokens)
        scores = draws.scores(liking, topics, piece)[:, 0, : prompt_tokens + left]  # [L, T, E]
        passes += _passes_of(scores, blur, prompt_tokens, top_k, random)
    name = f"{shape}, routing by parameters"
    return Trace(name, spec, top_k, None, passes, lookahead=LOOKAHEAD, agreement=(1.0,) * len(spec.layers))


@dataclass(frozen=True)
class _Draws:
    """Normal numbers that scores are made of: always [L, 1, 1, E], and in texts [L, P, T, E]."""

    always: Scores
    varying: Scores
    token: Scores
    guessing: Scores

    @classmethod
    def of(cls, layers: int, pieces: int, length: int, experts: int, seed: int, lasting: float) -> _Draws:
        random = np.random.default_rng(seed)
        size = (layers, pieces, length, experts)

        def draw(*sizes: int) -> Scores:
            return random.standard_normal(sizes, dtype=np.float32)

        always = draw(layers, 1, 1, experts)
        text, words = (_drifting(draw(*size), over) for over in (_DRIFT_TOKENS, _WORDS_TOKENS))
        varying = np.float32(lasting**0.5) * text + np.float32((1 - lasting) ** 0.5) * words
        return cls(always, varying, draw(*size), draw(min(layers, _SOLVED_LAYERS), *size[1:]))

    def first(self, layers: int) -> _Draws:
        """Those of the first layers."""
        return _Draws(*(part[:layers] for part in (self.always, self.varying, self.token, self.guessing)))

    def scores(self, liking: float, topics: float, piece: int | None = None) -> Scores:
        """Scores with parts of these sizes, of one text or of all."""
        at = slice(None) if piece is None else slice(piece, piece + 1)
        return liking * self.always + topics * self.varying[:, at] + self.token[:, at]


def _drifting(draws: Scores, over_tokens: float) -> Scores:
    """Normal numbers that stay correlated over so many tokens, from independent ones."""
    kept = float(np.exp(-1 / over_tokens))
    fresh = float(np.sqrt(1 - kept**2))
    for token in range(1, draws.shape[2]):
        draws[:, :, token] = kept * draws[:, :, token - 1] + fresh * draws[:, :, token]
    return draws


def _top(scores: Scores, top_k: int) -> Chosen:
    """Which experts are chosen."""
    least = np.partition(scores, -top_k, axis=-1)[..., -top_k, None]
    return scores >= least


def _solved_parts(draws: _Draws, wanted: Statistics, top_k: int) -> tuple[float, float]:
    """Sizes of the parts that stay over all texts and within one."""
    liking, topics = 0.3, 0.5
    quarter = max(1, draws.always.shape[-1] // 4)

    def hottest(size: float) -> float:
        counts = np.sort(_top(draws.scores(size, topics), top_k).sum(axis=(1, 2)), axis=-1)  # [L, E]
        return float(np.mean(counts[:, -quarter:].sum(-1) / counts.sum(-1)))

    def repeated(size: float) -> float:
        chosen = _top(draws.scores(liking, size), top_k)
        both = chosen[:, :, 1:] & chosen[:, :, :-1]
        return float(both.sum() / chosen[:, :, 1:].sum())

    for _ in range(_ROUNDS):
        liking = _solve(hottest, wanted.hottest_quarter, 2.0)
        topics = _solve(repeated, wanted.repeat, 4.0)
    return liking, topics


def _solved_blur(scores: Scores, noise: Scores, recall: float, top_k: int) -> float:
    """The size of a guess's noise, one layer ahead."""
    chosen = _top(scores, top_k)

    def missed(size: float) -> float:
        return 1 - float((_top(scores + size * noise, top_k) & chosen).sum() / chosen.sum())

    return _solve(missed, 1 - recall, 16.0)


def _solve(found: Callable[[float], float], wanted: float, most: float) -> float:
    """The size, from 0 on, at which a figure that grows with it is as wanted."""
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < wanted else (low, middle)
    return (low + high) / 2


def _passes_of(
    scores: Scores, blur: float, prompt_tokens: int, top_k: int, random: np.random.Generator
) -> Iterator[Pass]:
    """A prompt and the decoded tokens behind it."""
    layers = range(scores.shape[0])
    ranked = np.argsort(-scores, axis=-1)[:, :, :top_k]  # [L, T, k]
    weights = np.exp(np.take_along_axis(scores, ranked, -1))
    weights /= weights.sum(-1, keepdims=True)
    prompt = [_prompt_step(layer, ranked[layer, :prompt_tokens], weights[layer, :prompt_tokens]) for layer in layers]
    yield Pass(Phase.PREFILL, prompt_tokens, tuple(prompt))
    decoded = scores[:, prompt_tokens:]
    guesses = [_guesses(decoded, blur * ahead**0.5, top_k, random) for ahead in range(1, LOOKAHEAD + 1)]
    experts, shares = ranked[:, prompt_tokens:].tolist(), weights[:, prompt_tokens:].tolist()
    for token in range(decoded.shape[1]):
        steps = []
        for layer in layers:
            ahead = range(1, min(LOOKAHEAD, len(layers) - 1 - layer) + 1)
            steps.append(
                Step(
                    layer,
                    Phase.DECODE,
                    dict.fromkeys(experts[layer][token], 1),
                    dict(zip(experts[layer][token], shares[layer][token], strict=True)),
                    {
                        layer + far: dict(zip(*(part[layer + far][token] for part in guesses[far - 1]), strict=True))
                        for far in ahead
                    },
                )
            )
        yield Pass(Phase.DECODE, 1, tuple(steps))


def _prompt_step(layer: int, ranked: NDArray[np.int64], weights: Scores) -> Step:
    counts = np.bincount(ranked.ravel())
    mass = np.bincount(ranked.ravel(), weights.ravel())
    active = np.nonzero(counts)[0].tolist()
    tokens = {e: int(counts[e]) for e in active}
    return Step(layer, Phase.PREFILL, tokens, {e: float(mass[e]) for e in active})


def _guesses(scores: Scores, blur: float, top_k: int, random: np.random.Generator) -> tuple[list[list[list[int]]], ...]:
    """Experts by how likely a gate finds them, and how likely each is: two lists [L][T][guesses]."""
    blurred = scores + blur * random.standard_normal(scores.shape, dtype=np.float32)
    kept = min(guesses_kept(top_k), scores.shape[-1])
    ranked = np.argsort(-blurred, axis=-1)[:, :, :kept]
    marks = np.exp(np.take_along_axis(blurred, ranked, -1))
    marks /= marks.sum(-1, keepdims=True)
    return ranked.tolist(), marks.tolist()
