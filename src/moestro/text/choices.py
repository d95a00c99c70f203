"""Turn a request's options and the checkpoint's own settings into arguments of Transformers' `generate`.

A request's option wins. What it leaves out is taken from the checkpoint's generation_config.json. Where that does not
say whether to sample either, a request without a temperature samples with Moestro's defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import GenerationConfig

from ..errors import CheckpointError, RequestError
from ..planning.spelling import spelled
from .options import TextOptions
from .settings import check_settings

SAMPLING_TEMPERATURE, SAMPLING_TOP_P, SAMPLING_TOP_K = 0.7, 0.95, 50


class SamplingOptions(Protocol):
    """What a request says about sampling; None leaves it to the checkpoint."""

    @property
    def temperature(self) -> float | None:
        """Which logits are divided by; 0 takes the likeliest token."""

    @property
    def top_p(self) -> float | None:
        """The probability that the likeliest tokens, which are sampled from, hold together."""

    @property
    def top_k(self) -> int | None:
        """How many of the likeliest tokens are sampled from; 0 for all."""

    @property
    def min_p(self) -> float | None:
        """The part of the likeliest token's probability that a token needs."""


@dataclass(frozen=True, slots=True)
class Choices:
    """How to generate: a request's options over a checkpoint's settings.

    keeps_cache: whether the KV cache is one of Moestro's, which holds exactly the tokens that were computed.
    goes_back: whether generation drops tokens from the cache again, as assisted decoding does.
    can_continue: whether a later generation may continue with that cache, if it can go back where it must.
    """

    num_beams: int
    stop: Sequence[str]
    keeps_cache: bool
    goes_back: bool
    can_continue: bool
    arguments: dict[str, Any]  # of Transformers' `generate`


def choose(options: TextOptions, own: GenerationConfig, rows: int) -> Choices:
    """Join a request's options and a checkpoint's settings.

    Args:
        own: the checkpoint's settings.
        rows: of the model's embedding; token ids are below it.

    Raises:
        ModelError: the checkpoint has settings that cannot be followed. RequestError: options that contradict.
    """
    check_settings(own, rows)
    num_beams = options.num_beams or own.num_beams or 1
    stop = options.stop or own.stop_strings or ()
    keeps_cache = own.use_cache is not False and own.cache_implementation in (None, "dynamic", "hybrid")
    lookup = options.prompt_lookup if options.prompt_lookup is not None else own.prompt_lookup_num_tokens
    if options.prompt_lookup and num_beams > 1:
        raise RequestError(
            f"{spelled('prompt_lookup', options.prompt_lookup)} guesses for one text, not for {num_beams} beams; "
            "leave one out"
        )
    if options.draft is not None:
        _check_draft(options.draft, own, num_beams, keeps_cache)
        lookup = None
    looks_up = lookup is not None and lookup > 0
    arguments: dict[str, Any] = {
        "max_length": None,  # max_new_tokens is always given
        "num_beams": num_beams,
        "num_return_sequences": 1,
        "return_dict_in_generate": True,
        # Nothing here reads them, and layers that must return them cannot be fused.
        **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), False),
        "stop_strings": None,  # answer.py ends the text at them
        "prompt_lookup_num_tokens": lookup if looks_up else None,
        **sampling_of(options, own, num_beams),
    }
    if keeps_cache:
        arguments["cache_implementation"] = None
    if options.repetition_penalty is not None:
        arguments["repetition_penalty"] = options.repetition_penalty
    return Choices(
        num_beams=num_beams,
        stop=[stop] if isinstance(stop, str) else list(stop),
        keeps_cache=keeps_cache,
        goes_back=looks_up or options.draft is not None,
        can_continue=keeps_cache and num_beams == 1,
        arguments=arguments,
    )


def settled(options: TextOptions, own: GenerationConfig) -> dict[str, Any]:
    """The options of a request by which tokens are chosen, as they are with what the checkpoint leaves to them."""
    num_beams = options.num_beams or own.num_beams or 1
    found = sampling_of(options, own, num_beams)
    penalty = options.repetition_penalty if options.repetition_penalty is not None else own.repetition_penalty
    return {
        "temperature": found["temperature"] or 0.0,
        **{name: found.get(name) for name in ("top_p", "top_k", "min_p")},
        "repetition_penalty": 1.0 if penalty is None else penalty,
        "num_beams": num_beams,
        "stop": list(options.stop or own.stop_strings or ()),
    }


def without_effect(options: TextOptions, own: GenerationConfig) -> list[str]:
    """A line for each option of a request that changes nothing, since nothing is drawn."""
    if sampling_of(options, own, options.num_beams or own.num_beams or 1)["do_sample"]:
        return []
    given = {name: getattr(options, name) for name in ("top_p", "top_k", "min_p")} | {"seed": options.seed or None}
    return [
        f"{spelled(name, value)} changes nothing here: the likeliest text is always taken; give "
        f"{spelled('temperature')}, above 0"
        for name, value in given.items()
        if value is not None
    ]


def _check_draft(draft: str, own: GenerationConfig, num_beams: int, keeps_cache: bool) -> None:
    """Refuse a draft beside settings of the checkpoint with which Transformers cannot follow it.

    Raises:
        RequestError: a line that names the setting.
    """
    hinders = {
        f"num_beams {num_beams}": num_beams > 1,
        f"use_cache {own.use_cache} and cache_implementation {own.cache_implementation}": not keeps_cache,
        f"guidance_scale {own.guidance_scale}": own.guidance_scale not in (None, 1),
    }
    for setting, does in hinders.items():
        if does:
            raise RequestError(f"{spelled('draft', draft)} does not go with the checkpoint's {setting}; leave it out")


def no_number() -> CheckpointError:
    """What is raised where the model's output is not a number."""
    return CheckpointError(
        "the model's output is not a number: its weights are damaged, or too large for float16; "
        f"try {spelled('dtype', 'float32')}"
    )


def sampling_of(options: SamplingOptions, own: GenerationConfig, num_beams: int = 1) -> dict[str, Any]:
    """How to choose tokens, as arguments of Transformers' `generate`. A request's word wins over the checkpoint's."""
    temperature = options.temperature
    if temperature is None:
        if own.do_sample is False:
            temperature = 0.0
        elif own.temperature is not None:
            temperature = float(own.temperature)
        elif own.do_sample:
            temperature = 1.0
        else:
            temperature = 0.0 if num_beams > 1 else SAMPLING_TEMPERATURE
    names = ("top_p", "top_k", "min_p")
    if temperature == 0:
        # Greedy search warns about sampling options, so they are unset there, the checkpoint's too.
        return {"do_sample": False, "temperature": None, **dict.fromkeys(names)}
    ours = {} if own.do_sample else {"top_p": SAMPLING_TOP_P, "top_k": SAMPLING_TOP_K}
    chosen: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    for name in names:
        values = (getattr(options, name), getattr(own, name), ours.get(name))
        value = next((value for value in values if value is not None), None)
        if value is not None:  # else Transformers' default
            chosen[name] = None if name == "min_p" and value == 0 else value
    return chosen
