"""Text in, text out, with its speeds: what `run` and `chat` share.

Generation itself is Transformers'. This file tokenizes, checks the context, streams, stops and times.

    result = generate_text(model, tokenizer, "Once upon a time", TextOptions(), on_text=print)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from .accounts import Counters
from .context import model_context
from .errors import CheckpointError, RequestError
from .machine import peak_ram_bytes
from .planning.clock import Clock
from .tape import TapeFigures, cache_for, figures_of

SAMPLING_TEMPERATURE = 0.7

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How to choose tokens and when to end. Named as Transformers names them.

    temperature: 0 is greedy; None is 0.7, or a plain beam search where there are beams.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float = 0.95
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    num_beams: int = 1

    def __post_init__(self) -> None:
        temperature = SAMPLING_TEMPERATURE if self.temperature is None else self.temperature
        checks = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, temperature == 0 or temperature >= 0.01, "0, or at least 0.01"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "0 or more, below 2**63"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("--repetition-penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("--num-beams", self.num_beams, self.num_beams >= 1, "at least 1"),
        )
        for option, value, holds, needed in checks:
            if not holds:
                raise RequestError(f"{option} {value}: needs {needed}")

    def for_generate(self) -> dict[str, Any]:
        """The keyword arguments of Transformers' `generate`."""
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.num_beams > 1 else SAMPLING_TEMPERATURE
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": temperature > 0,
        }
        # Greedy search warns about sampling options, so they are unset there, the checkpoint's too.
        sampling = {
            "temperature": temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or None,
        }
        return chosen | (sampling if temperature > 0 else dict.fromkeys(sampling))


@dataclass(frozen=True, slots=True)
class TextResult:
    """What was generated and how fast.

    reused_tokens: tokens of the prompt that the KV cache had from before; they are not in prefill_tok_s.
    decode_tok_s: None when only one token was made. context_full: it ended because the model's context
    did. peak_bytes: tier -> the most memory used at once. hit_rate: of decode; None where no expert can be on a GPU.
    bytes_moved: of experts, over the link. tape: of steps that were recorded; None where
    none can be. Times are the conductor's clock's, which may be a virtual one.
    """

    text: str
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_tok_s: float
    decode_tok_s: float | None
    ttft_s: float
    context_full: bool
    peak_bytes: dict[str, int]
    hit_rate: float | None
    bytes_moved: int
    tape: TapeFigures | None
    sequence: Tensor = field(repr=False)  # int64 [prompt + new], on the host
    cache: Any = field(repr=False, default=None)

    def to_json(self) -> dict[str, Any]:
        """The figures as `--json` prints them."""
        names = (
            "text",
            "prefill_tok_s",
            "decode_tok_s",
            "ttft_s",
            "peak_bytes",
            "hit_rate",
            "bytes_moved",
            "prompt_tokens",
            "new_tokens",
        )
        tape = None if self.tape is None else self.tape.to_json()
        return {name: getattr(self, name) for name in names} | {"tape": tape}


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Tensor,
    options: TextOptions,
    *,
    on_text: OnText | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    cache: Any = None,
) -> TextResult:
    """Generate from a prompt, streaming where there is one sequence to stream.

    Args:
        prompt: text, or token ids int64 [tokens].
        on_text: called with each new piece of text.
        should_stop: asked after each step; True ends the answer there.
        cache: a KV cache that holds the first tokens of the prompt.

    Raises:
        RequestError: an empty prompt, or one too long for the model or for what its GPU memory was planned for.
    """
    ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
    max_new_tokens = check_context(model, len(ids), options.max_new_tokens, options.num_beams)
    reused_tokens = 0 if cache is None else int(cache.get_seq_length())
    cache = cache_for(model, cache, len(ids) + max_new_tokens, options.num_beams)
    conductor = model.moestro
    clock = _StepClock(should_stop, conductor.time)
    before, tape_before = replace(conductor.counters), figures_of(model)
    stream = _Stream(tokenizer, on_text or (lambda text: None), options.stop)
    start_s = conductor.time.now_s
    with _seeded(options.seed), _explained():
        output = model.generate(
            ids[None].to(model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            past_key_values=cache,
            stopping_criteria=[clock],
            streamer=stream if options.num_beams == 1 else None,
            stop_strings=list(options.stop) or None,
            tokenizer=tokenizer,
            pad_token_id=_pad_token(model, tokenizer),
            num_return_sequences=1,
            return_dict_in_generate=True,
            **(options.for_generate() | {"max_new_tokens": max_new_tokens}),
        )
    sequence = output.sequences[0].cpu()
    if options.num_beams > 1:
        stream.on_finalized_text(tokenizer.decode(sequence[len(ids) :], skip_special_tokens=True), True)
    new_tokens = len(sequence) - len(ids)
    return TextResult(
        text=stream.text,
        prompt_tokens=len(ids),
        reused_tokens=reused_tokens,
        new_tokens=new_tokens,
        **_speeds(len(ids) - reused_tokens, start_s, clock.times_s),
        context_full=new_tokens == max_new_tokens < options.max_new_tokens,
        **_costs(model, before, tape_before),
        sequence=sequence,
        cache=getattr(output, "past_key_values", None),
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = True) -> Tensor:
    """Token ids of a text: int64 [tokens].

    Raises:
        RequestError: there is nothing to start from.
    """
    # Not verbose: it would warn of a text longer than the context, which is checked elsewhere.
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise RequestError("the prompt is empty, and this model's tokenizer has no token to begin a text with")
    return torch.tensor(ids, dtype=torch.long)


def check_context(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int, num_beams: int = 1) -> int:
    """How many new tokens the model's context has room for, at most `max_new_tokens`.

    Raises:
        RequestError: the prompt alone fills the context, or all of it is more than GPU memory was planned for.
    """
    context = model_context(model.config)
    if context is not None and prompt_tokens >= context:
        raise RequestError(f"the prompt has {prompt_tokens} tokens, but the model's context is {context}; shorten it")
    new_tokens = max_new_tokens if context is None else min(max_new_tokens, context - prompt_tokens)
    if (plan := model.moestro.gpu_plan) is not None:
        plan.check_tokens(prompt_tokens, new_tokens, num_beams)
    return new_tokens


def peak_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Tier -> the most memory used at once so far, in bytes."""
    return {"ram": peak_ram_bytes(), "gpu": model.moestro.device.peak_bytes()}


def _speeds(prompt_tokens: int, start_s: float, times_s: Sequence[float]) -> dict[str, Any]:
    """Of a result, from when it began and when each of its steps ended."""
    return {
        "prefill_tok_s": prompt_tokens / (times_s[0] - start_s),
        "decode_tok_s": (len(times_s) - 1) / (times_s[-1] - times_s[0]) if len(times_s) > 1 else None,
        "ttft_s": times_s[0] - start_s,
    }


def _costs(model: PreTrainedModel, before: Counters, tape_before: TapeFigures | None) -> dict[str, Any]:
    """What the text took, named as in `TextResult`."""
    conductor, tape = model.moestro, figures_of(model)
    return {
        "peak_bytes": peak_bytes(model),
        "hit_rate": _hit_rate(before, conductor.counters) if conductor.slots else None,
        "bytes_moved": conductor.counters.moved_bytes - before.moved_bytes,
        "tape": None if tape is None or tape_before is None else tape.since(tape_before),
    }


def _hit_rate(before: Counters, after: Counters) -> float | None:
    """Hits of all (expert, step) pairs of decode in between; None where there were none."""
    hits = after.hits - before.hits
    used = hits + after.joined - before.joined + after.misses - before.misses
    return hits / used if used else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of a seed within, those of before after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _explained() -> Iterator[None]:
    """One line for the one thing that damaged weights make of sampling."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise CheckpointError(
            "the model's output is not a number: its weights are damaged, or too large for float16; try --dtype float32"
        ) from error


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A padding token, so that Transformers need not warn that it picks one."""
    for token in (model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


class _StepClock(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Notes when each step ended; asked last in a step, so it also ends the answer on request."""

    def __init__(self, should_stop: Callable[[], bool], clock: Clock) -> None:
        self.times_s: list[float] = []
        self._should_stop, self._clock = should_stop, clock

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times_s.append(self._clock.now_s)
        return torch.full((input_ids.shape[0],), self._should_stop(), dtype=torch.bool, device=input_ids.device)


class _Stream(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Passes text on as it becomes final, up to the first stop string and without it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText, stop: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._on_text = on_text
        self._stop = [word for word in stop if word]
        self._held = ""  # may be the beginning of a stop string
        self._stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._stopped:
            return
        pending = self._held + text
        found = [at for word in self._stop if (at := pending.find(word)) >= 0]
        if found:
            self._stopped, cut = True, min(found)
        else:
            longest = 0 if stream_end else max((len(word) - 1 for word in self._stop), default=0)
            cut = max(0, len(pending) - longest)
        ready, self._held = pending[:cut], pending[cut:]
        self.text += ready
        if ready:
            self._on_text(ready)
