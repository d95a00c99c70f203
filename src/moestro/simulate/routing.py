"""What is known of how real models route, as a few parameters with sources (routing.json), for replays without a model.

    >>> routing_of("mixtral-8x7b").low.repeat
    0.32

Each parameter is a range. `low` and `high` take all lower and all upper ends: how much a cache and a guess can win.
simulate/expand.py makes traces of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import RequestError

PARAMETERS = ("hottest_quarter", "repeat", "lasting", "recall")


@dataclass(frozen=True, slots=True)
class Statistics:
    """How experts are chosen.

    hottest_quarter: of a layer's uses, over three texts, the share of its hottest quarter of experts.
    repeat: of a token's experts, the share that the token before used too: the hits of an LRU of top-k slots a layer.
    lasting: of what makes experts be used again beyond a layer's liking, the share that is of the text, not of words.
    recall: of a layer's experts, the share among as many guesses of one layer before.
    """

    hottest_quarter: float
    repeat: float
    lasting: float
    recall: float


@dataclass(frozen=True, slots=True)
class Routing:
    """A shape's ranges. sources: by parameter, where its range is from. assumed: parameters that are not published."""

    shape: str
    seed: int
    low: Statistics
    high: Statistics
    sources: dict[str, str]
    assumed: tuple[str, ...]

    def in_words(self) -> str:
        """The ranges in one line."""
        said = []
        for name in PARAMETERS:
            low, high = getattr(self.low, name), getattr(self.high, name)
            mark = ", assumed" if name in self.assumed else ""
            ends = f"{low:g} to {high:g}" if low < high else f"{low:g}"
            said.append(f"{name.replace('_', ' ')} {ends}{mark}")
        return "; ".join(said)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "assumed": True,
            **{
                name: {
                    "range": [getattr(self.low, name), getattr(self.high, name)],
                    "assumed": name in self.assumed,
                    "source": self.sources[name],
                }
                for name in PARAMETERS
            },
        }


def routed_shapes() -> tuple[str, ...]:
    """Shapes whose routing is known or assumed."""
    return tuple(_shapes())


def routing_of(shape: str) -> Routing:
    """What is known or assumed of a shape's routing.

    Raises:
        RequestError: nothing is.
    """
    if shape not in _shapes():
        raise RequestError(f"nothing is known of how {shape} routes; there are: {', '.join(routed_shapes())}")
    found = _shapes()[shape]
    low, high = (Statistics(*(found[name]["range"][end] for name in PARAMETERS)) for end in (0, 1))
    return Routing(
        shape,
        found["seed"],
        low,
        high,
        sources={name: found[name]["source"] for name in PARAMETERS},
        assumed=tuple(name for name in PARAMETERS if found[name]["kind"] == "assumed"),
    )


@cache
def _shapes() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("routing.json").read_bytes())
    return table["shapes"]  # type: ignore[no-any-return]
