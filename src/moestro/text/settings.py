"""A table of every generation setting that a checkpoint may have, and whether it is followed.

`SETTINGS` has a row for each key of Transformers' `GenerationConfig`; a test fails on a key without one.

    >>> check_settings(model.generation_config, rows=model.config.vocab_size)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from ..errors import ModelError

FOLLOWED, OURS, REFUSED = "Transformers follows it", "Moestro follows it", "refused"


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table.

    how: FOLLOWED, so that it is passed on; OURS, as `note` says; or REFUSED unless it is unset or has no effect.
    holds: takes a value and the rows of the embedding; whether that value can be followed. needs: such values in words.
    """

    how: str
    needs: str
    holds: Callable[[Any, int], bool]
    note: str = ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_ids(value: Any, rows: int) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_int(token) and 0 <= token < rows for token in value)


def _number(how: str, low: float, high: float = float("inf"), note: str = "") -> Setting:
    needs = f"a number of at least {low:g}" if high == float("inf") else f"a number between {low:g} and {high:g}"
    return Setting(how, needs, lambda value, rows: _is_number(value) and low <= value <= high, note)


def _whole(how: str, low: int, note: str = "") -> Setting:
    return Setting(how, f"a whole number of at least {low}", lambda value, rows: _is_int(value) and value >= low, note)


def _flag(how: str, note: str = "") -> Setting:
    return Setting(how, "true or false", lambda value, rows: isinstance(value, bool), note)


def _text(how: str, *words: str, note: str = "") -> Setting:
    needs = f"one of {', '.join(words)}" if words else "a text"
    return Setting(how, needs, lambda value, rows: isinstance(value, str) and (not words or value in words), note)


def _any(how: str, note: str = "") -> Setting:
    return Setting(how, "anything", lambda value, rows: True, note)


def _table(how: str) -> Setting:
    return Setting(how, "an object", lambda value, rows: isinstance(value, dict))


def _refused(note: str, *harmless: Any) -> Setting:
    """Refuses all values but those that change nothing."""
    return Setting(REFUSED, note, lambda value, rows: any(value is each or value == each for each in harmless), note)


_ID = "the id of a token that the model has"
_TOKEN = Setting(FOLLOWED, _ID, lambda value, rows: _is_int(value) and 0 <= value < rows)
_TOKENS = Setting(FOLLOWED, "ids of tokens that the model has", _are_ids)
_MARK = Setting(FOLLOWED, "a token's id", lambda value, rows: _is_int(value))
_MARKS = Setting(  # an id that no token has ends nothing, in Transformers too
    FOLLOWED,
    "a token's id, or several",
    lambda value, rows: _is_int(value) or (isinstance(value, (list, tuple)) and all(map(_is_int, value))),
)
_FORCED = Setting(
    FOLLOWED, "ids of tokens that the model has", lambda value, rows: _are_ids([value], rows) or _are_ids(value, rows)
)
_MOVED = "Transformers moved it to code on the hub, which is not run; set it to null"
_DRAFT = "it is for a kind of draft that Moestro does not run; set it to null"
_ALONE = "has no effect: a draft guesses as many tokens as Moestro tells it"
_OPTION = "an option of the request wins, then this, then Moestro's default"

SETTINGS: dict[str, Setting] = {
    # How long
    "max_length": _whole(OURS, 0, "has no effect: the number of new tokens is always said"),
    "max_new_tokens": _whole(OURS, 1, "has no effect: the request always says it"),
    "min_length": _whole(FOLLOWED, 0),
    "min_new_tokens": _whole(FOLLOWED, 0),
    "early_stopping": _any(FOLLOWED),
    "max_time": _number(FOLLOWED, 0),
    "stop_strings": Setting(
        OURS,
        "a text or a list of texts",
        lambda value, rows: (
            all(isinstance(word, str) for word in ([value] if isinstance(value, str) else value))
            if isinstance(value, (str, list, tuple))
            else False
        ),
        "the request's stop strings win; either end the text and are not in it",
    ),
    # How to search
    "do_sample": _flag(OURS, "a temperature of the request wins"),
    "num_beams": _whole(OURS, 1, _OPTION),
    "use_mtp": _refused("multi-token prediction is not supported; set it to false", False),
    # Cache
    "use_cache": _flag(OURS, "false: no cache, and a chat reads its history again each turn"),
    "cache_implementation": Setting(
        OURS,
        "dynamic, static, offloaded, offloaded_static or quantized",
        lambda value, rows: value != "paged",
        "dynamic is Moestro's own; else Transformers makes it, and a chat reads its history again each turn",
    ),
    "cache_config": _table(FOLLOWED),
    "max_cache_len": _whole(FOLLOWED, 1),
    # Scores
    "temperature": _number(OURS, 0, note=_OPTION),
    "top_k": _whole(OURS, 0, _OPTION),
    "top_p": _number(OURS, 0, 1, _OPTION),
    "min_p": _number(OURS, 0, 1, _OPTION),
    "repetition_penalty": _number(OURS, 1e-9, note=_OPTION),
    "top_h": _number(FOLLOWED, 0, 1),
    "typical_p": _number(FOLLOWED, 0),
    "epsilon_cutoff": _number(FOLLOWED, 0),
    "eta_cutoff": _number(FOLLOWED, 0),
    "encoder_repetition_penalty": _number(FOLLOWED, 1e-9),
    "length_penalty": _number(FOLLOWED, float("-inf")),
    "no_repeat_ngram_size": _whole(FOLLOWED, 0),
    "encoder_no_repeat_ngram_size": _whole(FOLLOWED, 0),
    "bad_words_ids": Setting(
        FOLLOWED,
        "lists of ids of tokens that the model has",
        lambda value, rows: isinstance(value, (list, tuple)) and all(_are_ids(ids, rows) for ids in value),
    ),
    "renormalize_logits": _flag(FOLLOWED),
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": _FORCED,
    "remove_invalid_values": _flag(FOLLOWED),
    "exponential_decay_length_penalty": Setting(
        FOLLOWED,
        "a whole number and a factor",
        lambda value, rows: (
            isinstance(value, (list, tuple)) and len(value) == 2 and _is_int(value[0]) and _is_number(value[1])
        ),
    ),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "sequence_bias": Setting(FOLLOWED, "lists of ids with a bias", lambda value, rows: isinstance(value, (list, dict))),
    "token_healing": _refused("Moestro does not rewrite the prompt; set it to false", False),
    "guidance_scale": _number(FOLLOWED, float("-inf")),
    "watermarking_config": _any(FOLLOWED),
    # What comes back
    "num_return_sequences": _whole(OURS, 1, "one answer is made"),
    "output_attentions": _any(OURS, "off: nothing reads it"),
    "output_hidden_states": _any(OURS, "off: nothing reads it"),
    "output_scores": _any(OURS, "off: nothing reads it"),
    "output_logits": _any(OURS, "off: nothing reads it"),
    "return_dict_in_generate": _any(OURS, "always on"),
    # Tokens
    "pad_token_id": _MARK,
    "bos_token_id": _MARK,
    "eos_token_id": _MARKS,
    "decoder_start_token_id": _MARKS,
    # Assisted decoding
    "is_assistant": _refused("the model is not a draft model here; set it to false", False),
    "num_assistant_tokens": _any(FOLLOWED, _ALONE),
    "num_assistant_tokens_schedule": _any(FOLLOWED, _ALONE),
    "assistant_confidence_threshold": _any(FOLLOWED, _ALONE),
    "assistant_lookbehind": _any(FOLLOWED, _ALONE),
    "target_lookbehind": _any(FOLLOWED, _ALONE),
    "prompt_lookup_num_tokens": _whole(FOLLOWED, 1, "with sliding windows, a chat reads its history again each turn"),
    "max_matching_ngram_size": _whole(FOLLOWED, 1),
    "assistant_early_exit": _refused("an early exit would need a model that was trained for it; set it to null"),
    "assistant_ensemble_weight": _refused(_DRAFT),
    "speculation_type": _refused(_DRAFT),
    # How to compute
    "compile_config": _any(FOLLOWED),
    "disable_compile": _flag(FOLLOWED),
    "continuous_batching_config": _any(FOLLOWED, "has no effect here"),
    "prefill_chunk_size": _whole(FOLLOWED, 1),
    # Moved to the hub
    "low_memory": _any(FOLLOWED, "does nothing by itself"),
    "penalty_alpha": _refused(_MOVED, 0),
    "dola_layers": _refused(_MOVED),
    "diversity_penalty": _refused(_MOVED, 0),
    "num_beam_groups": _refused(_MOVED, 1),
    "constraints": _refused(_MOVED),
    "force_words_ids": _refused(_MOVED),
    # About the file
    "_from_model_config": _any(FOLLOWED),
    "transformers_version": _any(FOLLOWED),
}


def check_settings(own: GenerationConfig, rows: int) -> None:
    """Refuse a checkpoint's settings that would not be followed.

    Args:
        rows: of the model's embedding; token ids are below it.

    Raises:
        ModelError: a line that names the setting, its value and what to do.
    """
    for name, setting in SETTINGS.items():
        value = getattr(own, name, None)
        if value is None or setting.holds(value, rows):
            continue
        found = f"the checkpoint's generation settings have {name} {value!r}"
        if setting.how == REFUSED:
            raise ModelError(f"{found}: {setting.needs} in generation_config.json")
        raise ModelError(f"{found}, which is not {setting.needs}; mend generation_config.json")


def unusual_settings(own: GenerationConfig) -> list[str]:
    """The settings that Transformers follows and that differ from its defaults, each as "name value"."""
    usual = GenerationConfig._get_default_generation_params()
    skipped = {"bos_token_id", "eos_token_id", "pad_token_id", "disable_compile"}
    return [
        f"{name} {value!r}"
        for name, setting in SETTINGS.items()
        if not name.startswith("_")
        and name not in skipped | {"transformers_version", "decoder_start_token_id"}
        and (setting.how == FOLLOWED or name in ("cache_implementation", "use_cache"))
        and (value := getattr(own, name, None)) is not None
        and value != usual.get(name)
    ]
