"""Choose one request's tokens, with its own random numbers: what else runs does not change them.

Transformers' processors change the scores. Legend: V tokens of the vocabulary, S tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..errors import ModelError
from ..text.choices import no_number, sampling_of
from ..text.settings import unusual_settings
from .requests import Constraint, Request, TokenLogprobs

_HIGHEST_SCORE = 1e30  # finite also where a temperature divides it
_LOWEST_TEMPERATURE = 1e-4  # below it, all but the likeliest token have no probability in float32

# The checkpoint's settings that change scores -> what follows them, of value, prompt's tokens and ids that end a text.
_FOLLOWED: dict[str, Callable[[Any, int, list[int]], LogitsProcessor]] = {
    "sequence_bias": lambda value, prompt, ends: SequenceBiasLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, prompt, ends: NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, prompt, ends: NoBadWordsLogitsProcessor(value, ends),
    "min_length": lambda value, prompt, ends: MinLengthLogitsProcessor(value, ends),
    "min_new_tokens": lambda value, prompt, ends: MinNewTokensLengthLogitsProcessor(prompt, value, ends),
    "suppress_tokens": lambda value, prompt, ends: SuppressTokensLogitsProcessor(value),
    "begin_suppress_tokens": lambda value, prompt, ends: SuppressTokensAtBeginLogitsProcessor(value, prompt),
    "typical_p": lambda value, prompt, ends: TypicalLogitsWarper(value),
    "renormalize_logits": lambda value, prompt, ends: LogitNormalization(),
}
_NEED_ENDS = ("min_length", "min_new_tokens")
_NO_EFFECT = frozenset(  # on one sampled text that begins with a prompt
    (
        "early_stopping",
        "length_penalty",
        "cache_config",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "prefill_chunk_size",
        "low_memory",
        "continuous_batching_config",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "cache_implementation",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "use_cache",
        "assistant_lookbehind",
        "target_lookbehind",
        "repetition_penalty",
        "_from_model_config",
    )
)


def check_followed(own: GenerationConfig) -> None:
    """Refuse a checkpoint's settings that a server's steps do not follow.

    Raises:
        ModelError: a line that names them.
    """
    names = [line.split(" ", 1)[0] for line in unusual_settings(own)]
    strange = [name for name in names if name not in _FOLLOWED and name not in _NO_EFFECT]
    if strange:
        raise ModelError(
            f"a server does not follow the checkpoint's generation settings {', '.join(strange)}; "
            "remove them from generation_config.json"
        )


def ends_of(own: GenerationConfig) -> list[int]:
    """The tokens that end a text, by the checkpoint."""
    ends = own.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class Penalties(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """OpenAI's penalties: on the logits of tokens that the answer has, once for each token and for each time."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._prompt_tokens, self._presence, self._frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [1, S], scores [1, V] -> [1, V]."""
        tokens, counts = input_ids[0, self._prompt_tokens :].unique(return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self._presence + self._frequency * counts.to(scores.dtype)
        return scores


class Chooser:
    """Chooses a request's tokens."""

    def __init__(self, request: Request, own: GenerationConfig) -> None:
        sampling, prompt = request.sampling, len(request.prompt)
        chosen = sampling_of(sampling, own)
        self._logprobs = request.logprobs
        self._constraint: Constraint | None = request.constraint
        self._samples = bool(chosen["do_sample"]) and chosen["temperature"] >= _LOWEST_TEMPERATURE
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % 2**63)
        self._processors = _processors(request, own, prompt)
        self._warpers = LogitsProcessorList()
        if self._samples:
            if chosen["temperature"] != 1.0:
                self._warpers.append(TemperatureLogitsWarper(float(chosen["temperature"])))
            if chosen.get("top_k"):
                self._warpers.append(TopKLogitsWarper(chosen["top_k"]))
            if (chosen.get("top_p") or 1.0) < 1.0:
                self._warpers.append(TopPLogitsWarper(chosen["top_p"]))
            if chosen.get("min_p"):
                self._warpers.append(MinPLogitsWarper(chosen["min_p"]))

    def choose(self, logits: Tensor, ids: Tensor) -> tuple[int, TokenLogprobs | None]:
        """The next token, and its logarithms where these are wanted.

        Args:
            logits: float32 [V], on the CPU. ids: int64 [1, S], prompt and answer so far.

        Raises:
            CheckpointError: the model's output is not a number.
        """
        if bool(logits.isnan().any()):
            raise no_number()
        scores = self._processors(ids, logits[None].clone()).clamp(max=_HIGHEST_SCORE)
        if self._constraint is not None:
            scores = _constrained(self._constraint, scores, logits)
        if self._samples:
            scores = self._warpers(ids, scores)
            token = int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._random))
        else:
            token = int(scores[0].argmax())
        if self._constraint is not None:
            self._constraint.accept(token)
        return token, None if self._logprobs is None else _logprobs_of(logits, token, self._logprobs)


def _constrained(constraint: Constraint, scores: Tensor, logits: Tensor) -> Tensor:
    """Scores without the tokens that may not come next: [1, V].

    Where a checkpoint's settings forbid all that may come, these are weighed as the model did.
    """
    allowed = torch.zeros_like(logits)
    constraint.mask(allowed)
    forbidden = allowed.isneginf()
    for weighed in (scores[0], logits, allowed):
        found = weighed.masked_fill(forbidden, -torch.inf)
        if not bool(found.isneginf().all()):
            break
    return found[None]


def _processors(request: Request, own: GenerationConfig, prompt: int) -> LogitsProcessorList:
    found, sampling, ends = LogitsProcessorList(), request.sampling, ends_of(own)
    if sampling.logit_bias:
        bias = [[[int(token)], float(value)] for token, value in sampling.logit_bias.items()]
        found.append(SequenceBiasLogitsProcessor(bias))
    penalty = sampling.repetition_penalty if sampling.repetition_penalty is not None else own.repetition_penalty
    if penalty is not None and penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(Penalties(prompt, sampling.presence_penalty, sampling.frequency_penalty))
    unusual = {line.split(" ", 1)[0] for line in unusual_settings(own)}
    for name, make in _FOLLOWED.items():
        if name in unusual and (ends or name not in _NEED_ENDS):
            found.append(make(getattr(own, name), prompt, ends))
    return found


def _logprobs_of(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    logs = logits.log_softmax(-1)
    values, tokens = logs.topk(min(count, len(logs)))
    return TokenLogprobs(token, float(logs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
