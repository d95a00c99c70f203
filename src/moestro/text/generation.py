"""Continue a text and measure the speed, as `run` and `chat` do.

Transformers generates. This file tokenizes, checks the context, streams, stops and times.

    >>> generate_text(model, tokenizer, "Once upon a time", TextOptions(max_new_tokens=4)).new_tokens
    4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from ..decode.beams import read_once
from ..decode.capture import CaptureFigures, cache_for, figures_of
from ..engine.counters import Counters
from ..errors import ModelError, MoestroError, RequestError, faults_as, first_line
from ..loading.context import model_context
from ..machine.probe import major_faults, peak_ram_bytes
from ..planning.clock import Clock
from ..planning.spelling import spelled
from .answer import AnswerStream, OnText, StopText
from .assisted import AssistedFigures, begin_behind, check_goes_back, drafting, forwards_of, goes_on
from .channels import find_channels
from .choices import Choices, choose, no_number
from .faults import PageFaults
from .options import TextOptions
from .reading import OnProgress, Reading, watched
from .settings import unusual_settings


@dataclass(frozen=True, slots=True)
class TextResult:
    """What was generated and how fast.

    text: the answer. reasoning: what the model thought aloud before it, between marks of its family; None where there
    was nothing of the kind. reused_tokens: tokens of the prompt that the KV cache had from before; they are not in
    prefill_tok_s. decode_tok_s: None when only one token was made. context_full: it ended because the model's context
    did. peak_bytes: tier -> the most memory used at once. hit_rate: of decode; None where no expert can be on a GPU.
    bytes_moved: of experts, over the link. capture: what captured steps cost and save; None where none can be.
    assisted: what guessed tokens brought; None where none were guessed. faults: major page faults. Times are the
    conductor's clock's, which may be a virtual one; the time of page faults is real.
    """

    text: str
    reasoning: str | None
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
    capture: CaptureFigures | None
    assisted: AssistedFigures | None
    faults: PageFaults
    sequence: Tensor = field(repr=False)  # int64 [prompt + new], on the host
    cache: Any = field(repr=False, default=None)  # only one that a later generation may go on with

    def to_json(self) -> dict[str, Any]:
        """The figures as `--json` prints them."""
        names = (
            "text",
            "reasoning",
            "prefill_tok_s",
            "decode_tok_s",
            "ttft_s",
            "peak_bytes",
            "hit_rate",
            "bytes_moved",
            "prompt_tokens",
            "new_tokens",
        )
        capture = None if self.capture is None else self.capture.to_json()
        assisted = None if self.assisted is None else self.assisted.to_json()
        more = {"capture": capture, "assisted": assisted, "major_page_faults": self.faults.to_json()}
        return {name: getattr(self, name) for name in names} | more


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Tensor,
    options: TextOptions,
    *,
    on_text: OnText | None = None,
    on_reasoning: OnText | None = None,
    splits_channels: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    on_checked: Callable[[], None] = lambda: None,
    on_progress: OnProgress | None = None,
    cache: Any = None,
    draft: PreTrainedModel | None = None,
) -> TextResult:
    """Continue a prompt; without beams, stream the text as it is made.

    The text is what the tokenizer makes of prompt and answer together, without the prompt, up to the first stop string:
    see `moestro.text.stream`. The pieces that `on_text` gets add up to `text`.

    Args:
        prompt: text, or token ids int64 [tokens].
        on_text: called with each new piece of text.
        on_reasoning: called with each new piece of what the model thinks aloud.
        splits_channels: tell reasoning and answer apart by the marks of the tokenizer's family; False: all is text.
        should_stop: called after each step; True ends the answer there.
        on_checked: called once, when nothing of the request can be refused any more.
        on_progress: called with the share of the prompt that has been read, 1 when the first token is there.
        cache: a KV cache that holds the first tokens of the prompt.
        draft: the model that `options.draft` names, as `load_draft` loads it.

    Raises:
        RequestError: an empty prompt, one too long for the model or for what its GPU memory was planned for, or one
            with tokens that the model does not have; guesses of tokens, for a model whose cache cannot drop them.
        ModelError: the checkpoint's generation settings cannot be followed.
    """
    ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
    rows = embedding_rows(model)
    check_ids(tokenizer, ids, rows)
    choices = choose(options, model.generation_config, rows)
    if choices.goes_back:
        _check_guesses(model, options, draft)
    max_new_tokens = check_context(model, len(ids), options.max_new_tokens, choices.num_beams)
    cache = _cache_to_fill(model, cache, len(ids) + max_new_tokens, choices)
    on_checked()
    reused_tokens = 0 if cache is None else int(cache.get_seq_length())
    conductor = model.moestro
    reads_once = choices.num_beams > 1 and choices.keeps_cache and cache is None
    to_read = (len(ids) - reused_tokens) * (1 if reads_once else choices.num_beams)
    reading = None if on_progress is None else Reading(to_read, len(conductor.spec.layers), on_progress)
    clock = _StepClock(should_stop, conductor.time, reading)
    before, capture_before = replace(conductor.counters), figures_of(model)
    drafted = 0 if draft is None else forwards_of(draft)
    stream = AnswerStream(
        tokenizer,
        ids.tolist(),
        stop=choices.stop,
        on_text=on_text,
        on_reasoning=on_reasoning,
        channels=find_channels(tokenizer) if splits_channels else None,
    )
    start_s = conductor.time.now_s
    with _seeded(options.seed), drafting(), _explained(model), watched(model, reading):
        if reads_once:
            cache = read_once(model, ids.to(model.device), choices.num_beams)
        output = model.generate(
            ids[None].to(model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            stopping_criteria=[StopText(tokenizer, choices.stop, len(ids)), clock],
            streamer=stream if choices.num_beams == 1 else None,
            pad_token_id=_pad_token(model, tokenizer),
            **({} if cache is None else {"past_key_values": cache}),
            **({} if draft is None else {"assistant_model": draft}),
            **(choices.arguments | {"max_new_tokens": max_new_tokens}),
        )
    sequence = output.sequences[0].cpu()
    if choices.num_beams > 1:
        stream.add(sequence[len(ids) :].tolist())
        stream.end()
    new_tokens, steps = len(sequence) - len(ids), len(clock.times_s)
    assisted = AssistedFigures(steps, new_tokens - steps, None if draft is None else forwards_of(draft) - drafted)
    return TextResult(
        text=stream.text,
        reasoning=stream.reasoning,
        prompt_tokens=len(ids),
        reused_tokens=reused_tokens,
        new_tokens=new_tokens,
        **_speeds(len(ids) - reused_tokens, start_s, clock.times_s),
        context_full=new_tokens == max_new_tokens < options.max_new_tokens,
        **_costs(model, before, capture_before),
        assisted=assisted if choices.goes_back else None,
        faults=clock.faults(),
        sequence=sequence,
        cache=_continued(output, len(sequence), choices.goes_back) if choices.can_continue else None,
    )


def _cache_to_fill(model: PreTrainedModel, cache: Any, tokens: int, choices: Choices) -> Any:
    """The cache of a generation of so many tokens in all; None for one that Transformers makes."""
    cache = cache_for(model, cache, tokens, choices.num_beams) if choices.keeps_cache else None
    if choices.goes_back and any(layer.is_sliding for layer in getattr(cache, "layers", ())):
        return None  # our caches cannot take tokens back from a full window; Transformers' own can
    if choices.goes_back and cache is not None and int(cache.get_seq_length()):
        begin_behind(model, cache)
    return cache


def _check_guesses(model: PreTrainedModel, options: TextOptions, draft: PreTrainedModel | None) -> None:
    """Refuse guesses that the model cannot take back, and a draft that is named and not given.

    Raises:
        RequestError: a line that says which. ModelError: the checkpoint's settings ask for the guesses.
    """
    if options.draft is not None and draft is None:
        given = spelled("draft", options.draft)
        raise RequestError(f"{given} is not loaded; give generate_text what load_draft returns")
    if options.draft or options.prompt_lookup:
        check_goes_back(spelled("draft" if options.draft else "prompt_lookup"), "this", type(model), model.config)
        return
    setting = f"the checkpoint's prompt_lookup_num_tokens {model.generation_config.prompt_lookup_num_tokens}"
    try:
        check_goes_back(setting, "this", type(model), model.config)
    except RequestError as error:
        raise ModelError(f"{error} with {spelled('prompt_lookup', 0)}") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = True) -> Tensor:
    """Token ids of a text: int64 [tokens].

    Raises:
        RequestError: the tokenizer cannot encode the text, or it gives no token to start from.
    """
    remedy = "change the prompt, or use the tokenizer that belongs to the model"
    with faults_as(RequestError, "the tokenizer cannot encode the prompt", remedy):
        # Not verbose: the tokenizer would warn of a text longer than the context, which `check_context` refuses.
        ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise RequestError("the prompt is empty, and this model's tokenizer has no token to begin a text with")
    return torch.tensor(ids, dtype=torch.long)


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of tokens that the model has an embedding for."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(model.config.get_text_config().vocab_size if rows is None else rows)


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: Tensor, rows: int) -> None:
    """Refuse a prompt with tokens that the embedding has no rows for, before a kernel reads outside of it.

    Args:
        ids: int64 [tokens].
        rows: of the embedding.

    Raises:
        RequestError: a line that names the first such token, or the shape or dtype of ids that are none.
    """
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not len(ids):
        shape = "x".join(map(str, ids.shape)) or "a single"
        raise RequestError(f"the prompt is {shape} {ids.dtype}; it needs ids of one or more tokens, int64 [tokens]")
    strange = ids[(ids < 0) | (ids >= rows)]
    if len(strange):
        found = int(strange[0])
        token = tokenizer.convert_ids_to_tokens(found) if 0 <= found < len(tokenizer) else None
        name = "a token" if token is None else f"the token {token!r}"
        raise RequestError(
            f"the prompt has {name} of id {found}, but the model has {rows} tokens, from 0 to {rows - 1}; "
            "leave it out, or use the tokenizer that belongs to the model"
        )


def check_context(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int, num_beams: int = 1) -> int:
    """The number of new tokens that the model's context has room for, at most `max_new_tokens`.

    Raises:
        RequestError: the prompt alone fills the context, or prompt and answer are more than GPU memory was planned for.
    """
    context = model_context(model.config)
    if context is not None and prompt_tokens >= context:
        raise RequestError(f"the prompt has {prompt_tokens} tokens, but the model's context is {context}; shorten it")
    new_tokens = max_new_tokens if context is None else min(max_new_tokens, context - prompt_tokens)
    if (plan := model.moestro.gpu_plan) is not None:
        plan.check_tokens(prompt_tokens, new_tokens, num_beams)
    return new_tokens


def peak_bytes(model: PreTrainedModel) -> dict[str, int]:
    """The most bytes used at once so far, by tier: "ram" and "gpu"."""
    return {"ram": peak_ram_bytes(), "gpu": model.moestro.device.peak_bytes()}


def _speeds(prompt_tokens: int, start_s: float, times_s: Sequence[float]) -> dict[str, Any]:
    """Speeds, named as in `TextResult`, from the time of the start and of the end of each step, all in seconds."""
    return {
        "prefill_tok_s": prompt_tokens / (times_s[0] - start_s),
        "decode_tok_s": (len(times_s) - 1) / (times_s[-1] - times_s[0]) if len(times_s) > 1 else None,
        "ttft_s": times_s[0] - start_s,
    }


def _costs(model: PreTrainedModel, before: Counters, capture_before: CaptureFigures | None) -> dict[str, Any]:
    """Memory, hits and copies of a generation, named as in `TextResult`."""
    conductor, capture = model.moestro, figures_of(model)
    return {
        "peak_bytes": peak_bytes(model),
        "hit_rate": _hit_rate(before, conductor.counters) if conductor.slots else None,
        "bytes_moved": conductor.counters.moved_bytes - before.moved_bytes,
        "capture": None if capture is None or capture_before is None else capture.since(capture_before),
    }


def _hit_rate(before: Counters, after: Counters) -> float | None:
    """The share of expert uses in decode that were hits, between two readings of counters; None without decode."""
    hits = after.hits - before.hits
    used = hits + after.joined - before.joined + after.misses - before.misses
    return hits / used if used else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators inside the block and restore their state on exit."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _explained(model: PreTrainedModel) -> Iterator[None]:
    """Turn into one line what sampling raises with damaged weights, and what Transformers raises about settings.

    Raises:
        CheckpointError: the model's output is not a number. ModelError: settings that Transformers cannot follow.
    """
    try:
        yield
    except MoestroError:
        raise
    except Exception as error:
        unusual = unusual_settings(model.generation_config)
        if "probability tensor" in str(error) and not unusual:
            raise no_number() from error
        if unusual:
            raise ModelError(
                f"Transformers cannot follow the checkpoint's generation settings, {', '.join(unusual)} "
                f"({type(error).__name__}: {first_line(error)}); mend generation_config.json"
            ) from error
        raise


def _continued(output: Any, tokens: int, went_back: bool) -> Any:
    """The KV cache after a generation, if it holds exactly all tokens but the last, and can go on; else None."""
    cache = getattr(output, "past_key_values", None)
    if went_back and not goes_on(cache):
        return None
    try:
        return cache if cache is not None and int(cache.get_seq_length()) == tokens - 1 else None
    except (AttributeError, ValueError):  # a cache without attention layers has no length
        return None


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A padding token; without one, Transformers would choose one and warn of it."""
    for token in (model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


class _StepClock(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Notes the time in seconds at which each step ended, and ends the answer when `should_stop` returns True."""

    def __init__(self, should_stop: Callable[[], bool], clock: Clock, reading: Reading | None) -> None:
        self.times_s: list[float] = []
        self._should_stop, self._clock, self._reading = should_stop, clock, reading
        self._faults = [major_faults()]  # before, and at the end of each step
        self._real_s: list[float] = []

    def faults(self) -> PageFaults:
        """The major page faults until now."""
        before, first, last = self._faults[0], self._faults[1], self._faults[-1]
        return PageFaults(first - before, last - first, len(self.times_s), self._real_s[-1] - self._real_s[0])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._reading is not None:
            self._reading.done()
        self.times_s.append(self._clock.now_s)
        self._faults.append(major_faults())
        self._real_s.append(perf_counter())
        return torch.full((input_ids.shape[0],), self._should_stop(), dtype=torch.bool, device=input_ids.device)
