"""Fields that requests of all APIs share, how they are checked, and the engine's requests made of them.

What is not supported is refused: a field that is not named here or in an API's own model is an error of the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import RequestError
from .faults import Refused
from .requests import Constraint, Request, Sampling
from .service import Ready, Service

MOST_ANSWERS, MOST_STOPS = 16, 16  # of one request
_LONGEST_STOP = 200  # characters

T = TypeVar("T")
Listed = Annotated[list[T], Field(fail_fast=True)]  # of a million wrong elements, the errors would take gigabytes
ModelName = Annotated[str, Field(max_length=256)]  # it is echoed in each event of a stream


class Strict(BaseModel):
    """A JSON object with no other fields than these; a text is no number and a number no text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


_Stops = Annotated[Listed[Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]], Field(max_length=MOST_STOPS)]
Stop = Annotated[_Stops | None, BeforeValidator(_listed, json_schema_input_type=str | _Stops | None)]
Count = Annotated[int, Field(ge=1, le=2**31)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]


class Choosing(Strict):
    """How tokens are chosen, by the fields that OpenAI's APIs and other servers of open models have."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop_token_ids: Annotated[Listed[TokenId], Field(max_length=64)] | None = None

    def sampling(self, at: int) -> Sampling:
        """For the answer `at` of several: each has a seed of its own."""
        return Sampling(
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(0, self.top_k),  # -1 is "all" elsewhere
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_biases(self.logit_bias),
            seed=None if self.seed is None else (self.seed + at) % 2**63,
        )


class StreamOptions(Strict):
    """What a stream tells besides. include_usage: a last chunk with the counts of tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class NoEffect(Strict):
    """Fields of OpenAI's requests that do not change an answer: names of users, and hints for caches and bills."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    cache_prompt: bool | None = None


def check_values(given: BaseModel, possible: dict[str, tuple[Any, ...]]) -> None:
    """Refuse fields whose other values are not supported.

    Args:
        possible: field -> the values that ask for nothing that is not done; None is always one.
    """
    for name, values in possible.items():
        value = getattr(given, name)
        if value is not None and value not in values:
            can_be = " or ".join(map(repr, values)) if values else "left out"
            raise Refused(400, f"{name} is {value!r}; it must be {can_be}, nothing else is supported", param=name)


def check_length(ready: Ready, *given: Any) -> None:
    """Refuse texts of which the characters alone tell that they are too long: encoding them could take minutes.

    Args:
        given: texts, or values of JSON with texts in them.
    """
    characters = _characters(given)
    if characters > ready.longest_token * ready.engine.context:
        tokens = characters // ready.longest_token
        raise Refused(
            400,
            f"the prompt has {characters} characters, at least {tokens} tokens, but the context is "
            f"{ready.engine.context}; shorten the prompt",
            code="context_length_exceeded",
        )


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_characters, parts))


def check_model(service: Service, model: str) -> None:
    """Refuse another model's name where the server is strict about it."""
    if service.is_strict and model != service.name:
        line = f"there is no model {model!r}; this server has {service.name!r}"
        raise Refused(404, line, code="model_not_found", param="model")


def requests_for(
    ready: Ready,
    prompt: Sequence[int],
    *,
    choosing: Choosing,
    n: int = 1,
    max_new_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    logprobs: int | None = None,
    constraints: Sequence[Constraint | None] = (),
    keeps_marks: bool = True,
) -> list[Request]:
    """One request of the engine for each of n answers.

    Args:
        keeps_marks: whether the answer's text has the marks by which it is told apart.

    Raises:
        RequestError: more answers than may run and wait.
    """
    most = ready.engine.max_requests
    if n > most:
        raise RequestError(f"n is {n}; at most {most} answers run at a time here; ask for fewer")
    marks = {} if ready.responses is None or not keeps_marks else ready.responses.marks
    return [
        Request(
            prompt=prompt,
            sampling=choosing.sampling(at),
            max_new_tokens=max_new_tokens,
            stop=tuple(stop or ()),
            stop_token_ids=tuple(choosing.stop_token_ids or ()),
            marks=marks,
            logprobs=logprobs,
            constraint=constraints[at] if constraints else None,
        )
        for at in range(n)
    ]


def _biases(given: dict[str, float] | None) -> dict[int, float]:
    found = {}
    for token, bias in (given or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise RequestError(f"logit_bias names token {token[:20]!r}; it must be the number of a token")
        found[int(token)] = bias
    return found
