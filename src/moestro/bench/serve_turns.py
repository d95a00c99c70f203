"""Turns of conversations with a server's engine: what a turn costs beside a prompt of its new tokens alone.

Agents take turns. Before each answer the whole conversation is the prompt, as clients send it; what was read before is
to be found by the engine. Texts are random tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from .serve_load import answered

if TYPE_CHECKING:
    from ..serve.engine import Engine
    from ..serve.requests import Request

TURNS, FIRST_TOKENS, TURN_TOKENS, TURN_ANSWER = 5, 512, 128, 32
Make = Callable[[list[int], int], "Request"]  # of a prompt and the tokens of its answer


@dataclass(frozen=True, slots=True)
class TurnFigures:
    """One turn of conversations that so many agents hold in alternation: times to the first token.

    cached_tokens: of the prompt, not read again. cold_s: of a prompt of new_tokens alone. ratio: first_s over cold_s.
    """

    agents: int
    turn: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_s: float
    cold_s: float
    ratio: float


def turns_context() -> int:
    """Tokens of the longest conversation."""
    return FIRST_TOKENS + TURNS * (TURN_TOKENS + TURN_ANSWER)


def take_turns(engine: Engine, vocabulary: int, make: Make, rounds: int) -> tuple[TurnFigures, ...]:
    """Conversations of one agent and of two in alternation; medians of the rounds for each turn but the first."""
    found: dict[tuple[int, int], list[TurnFigures]] = {}
    draw = random.Random(7)
    for _ in range(rounds):
        for agents in (1, 2):
            for one in _conversations(engine, vocabulary, agents, make, draw):
                found.setdefault((one.agents, one.turn), []).append(one)
    return tuple(
        replace(
            each[-1],
            first_s=median(one.first_s for one in each),
            cold_s=median(one.cold_s for one in each),
            ratio=median(one.ratio for one in each),
        )
        for _, each in sorted(found.items())
    )


def _conversations(engine: Engine, vocabulary: int, agents: int, make: Make, draw: random.Random) -> list[TurnFigures]:
    said = [draw.choices(range(vocabulary), k=FIRST_TOKENS) for _ in range(agents)]
    found = []
    for turn in range(1, TURNS + 1):
        for agent in range(agents):
            one = answered(engine, agent, make(said[agent], TURN_ANSWER))
            if turn > 1:
                new = one.prompt_tokens - one.cached_tokens
                alone = answered(engine, agent, make(draw.choices(range(vocabulary), k=new), 1))
                first_s, cold_s = (each.times_s[0] - each.submitted_s for each in (one, alone))
                sizes = one.prompt_tokens, one.cached_tokens, new
                found.append(TurnFigures(agents, turn, *sizes, first_s, cold_s, first_s / cold_s))
            said[agent] = [*said[agent], *one.tokens, *draw.choices(range(vocabulary), k=TURN_TOKENS)]
    return found
