"""The options of a request for text: names, defaults, help and checks. Imports neither torch nor Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError
from ..planning.option import Checked, named, needs, option, option_like
from ..planning.options import ModelOptions
from ..planning.spelling import spelled

MOST_GUESSES = 15  # with one more token a step is still one of decode (engine/steps.py)


def _no_empty_stop(texts: Sequence[str], name: str) -> Sequence[str]:
    if "" in texts:
        given = spelled(name, "", quoted=True)
        raise RequestError(f"{given}: the text would end before it begins; name a text to end at, or leave it out")
    return texts


@dataclass(frozen=True, kw_only=True)
class TextOptions(Checked):
    """How to choose tokens and when to end, named as in Transformers. None leaves an option to the checkpoint.

    Raises:
        RequestError: one line that names the option, the value and what is possible.
    """

    max_new_tokens: int = option(
        128, "Stop after this many tokens.", short="-n", check=needs(lambda n: n >= 1, "at least 1")
    )
    temperature: float | None = option(
        None,
        "0 always takes the likeliest token.",
        unset="the checkpoint's, or 0.7; with beams, a plain beam search",
        check=needs(lambda t: t == 0 or t >= 0.01, "0, or at least 0.01"),
    )
    top_p: float | None = option(
        None,
        "Sample from the likeliest tokens that hold this much probability.",
        unset="the checkpoint's, or 0.95",
        check=needs(lambda p: 0 < p <= 1, "above 0 and at most 1"),
    )
    top_k: int | None = option(
        None,
        "Sample from this many likeliest tokens; 0 for all.",
        unset="the checkpoint's, or 50",
        check=needs(lambda k: k >= 0, "0 (off) or more"),
    )
    min_p: float | None = option(
        None,
        "Leave out tokens less likely than this part of the likeliest.",
        unset="the checkpoint's, or 0",
        check=needs(lambda p: 0 <= p <= 1, "between 0 and 1"),
    )
    repetition_penalty: float | None = option(
        None,
        "Above 1 makes tokens that were there less likely.",
        unset="the checkpoint's, or 1",
        check=needs(lambda p: p > 0, "above 0"),
    )
    seed: int = option_like(ModelOptions, "seed")
    stop: Sequence[str] = option(
        (),
        "End at this text; may be given several times.",
        unset="the checkpoint's, or none",
        check=_no_empty_stop,
    )
    num_beams: int | None = option(
        None,
        "Beams of a beam search; the text then comes at the end.",
        unset="the checkpoint's, or 1",
        check=needs(lambda n: n >= 1, "at least 1"),
    )
    prompt_lookup: int | None = option(
        None,
        "Guess up to so many next tokens from where the text had the last ones before, and compute them in one step; "
        "the text stays the same. 0 for none.",
        metavar="N",
        unset="the checkpoint's, or 0",
        check=needs(lambda n: 0 <= n <= MOST_GUESSES, f"0 to {MOST_GUESSES}"),
    )
    draft: str | None = option(
        None,
        "A smaller model with the same tokenizer, on the CPU, that guesses the next tokens; they are computed in one "
        "step, and the text stays the same.",
        metavar="MODEL",
        unset="none",
        check=named("a model's name"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft is None:
            return
        draft = spelled("draft", self.draft)
        if self.prompt_lookup:
            other = spelled("prompt_lookup", self.prompt_lookup)
            raise RequestError(f"{draft} and {other} both guess tokens; leave one out")
        if self.num_beams is not None and self.num_beams > 1:
            raise RequestError(f"{draft} guesses for one text, not for {self.num_beams} beams; leave one out")
