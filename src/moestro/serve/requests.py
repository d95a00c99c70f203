"""What a request asks for and what comes back: plain values, without a model.

>>> Sampling(temperature=0.8, seed=7).temperature
0.8
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import MoestroError, RequestError

if TYPE_CHECKING:  # the routes are there before torch is
    from torch import Tensor

    from .thinking import Thinking

Reason = Literal["stop", "length", "cancelled", "error"]


class QueueFull(RequestError):
    """As many requests wait as may; carries after how many seconds to try again."""

    def __init__(self, waiting: int, retry_s: float) -> None:
        self.retry_s = retry_s
        super().__init__(f"{waiting} requests wait already, no more may; try again in {retry_s:.0f} s")


class TooLong(RequestError):
    """Prompt and answer are longer than the context that memory was planned for; carries the numbers."""

    def __init__(self, prompt_tokens: int, new_tokens: int, context: int) -> None:
        self.prompt_tokens, self.new_tokens, self.context = prompt_tokens, new_tokens, context
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and {new_tokens} new ones are wanted, but the context is "
            f"{context}; shorten the prompt or ask for fewer"
        )


class NotReady(MoestroError):
    """The model is still being loaded, or was not; carries after how many seconds to ask again."""

    def __init__(self, line: str, retry_s: float = 5.0) -> None:
        self.retry_s = retry_s
        super().__init__(line)


class EngineStopped(MoestroError):
    """The engine takes no requests any more."""


class Constraint(Protocol):
    """Says which token may come next: a grammar, say. It belongs to one request and is asked by one thread."""

    @property
    def thinking(self) -> Thinking | None:
        """How an answer thinks aloud before what is content, whatever that holds.

        None: the marks of the model's family tell the answer's parts apart.
        """

    def mask(self, logits: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place: float32 [vocabulary], on the CPU."""

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens, named as in Transformers and in OpenAI's API. None leaves a value to the checkpoint.

    presence_penalty, frequency_penalty: taken from the logit of each token that the answer has, once and for each time.
    logit_bias: token id -> what is added to its logit. seed: None draws one.

    Raises:
        RequestError: one line that names the value and what is possible.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda t: t >= 0, "0 or more")
        _check("top_k", self.top_k, lambda k: k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, lambda p: 0 <= p <= 1, "between 0 and 1")
        _check("repetition_penalty", self.repetition_penalty, lambda p: p > 0, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), lambda p: -2 <= p <= 2, "between -2 and 2")
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias of token {token}", bias, lambda b: -100 <= b <= 100, "between -100 and 100")


def _check(name: str, value: float | None, holds: Callable[[float], bool], needs: str) -> None:
    if value is not None and not (isfinite(value) and holds(value)):
        raise RequestError(f"{name} is {value}; it must be {needs}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer that is wanted; n answers are n requests.

    prompt: token ids. max_new_tokens: None for as many as the context has room for. stop: texts that end the answer
    and are not in it; none for the checkpoint's own. stop_token_ids: tokens that end it, beside the checkpoint's.
    marks: special tokens whose text is in the answer's, which leaves all others out: those that mark its parts.
    logprobs: of how many likeliest tokens beside the chosen one; None for none at all.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    marks: Mapping[int, str] = field(default_factory=dict)
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, lambda n: n >= 1, "at least 1")
        _check("logprobs", self.logprobs, lambda n: 0 <= n <= 20, "between 0 and 20")
        if "" in self.stop:
            raise RequestError("stop has an empty text, at which the answer would end before it begins; leave it out")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logarithms of a token's probability, before sampling changes it, and of the likeliest tokens' in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer: the tokens of a step as they come, and the text that became final with them, perhaps none."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer; nothing comes after it.

    stop: the text or token that ended it. error: one line. cached_tokens: of the prompt, those whose keys and values
    were there. queued_s: until the prompt was begun; prompt_s: until its first token; decode_s: from there.
    """

    reason: Reason
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    stop: str | int | None = None
    error: str | None = None
    queued_s: float = 0.0
    prompt_s: float = 0.0
    decode_s: float = 0.0


Event = Piece | Finished
