"""Loads what a command names: the model, its tokenizer and a draft, after what can be checked without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..loading.once import remembering
from ..planning.budget import format_bytes
from ..planning.options import ModelOptions, Options
from ..text.options import TextOptions
from .preflight import check_model, check_named, check_readable
from .terminal import say


def load_all(
    model: str | None,
    source: ModelOptions,
    options: Options,
    check: Callable[[Any], Any] = lambda tokenizer: None,
    *,
    text: TextOptions | None = None,
) -> tuple[Any, Any, Any, Any]:
    """The model, its tokenizer, the draft that `text` names, or None, and what `check` returns.

    check: called with the tokenizer before the model loads.
    """
    trusted = source.trust_remote_code
    with remembering():
        check_named(model, source)
        check_readable(options.profile, "trace")
        check_model(model, source, draft=None if text is None else text.draft)

        from ..compute.cpu import core_cpus
        from ..loading.load import load, load_tokenizer
        from ..text.assisted import check_guesses, draft_bytes, load_draft
        from .notes import say_kernels, say_without_effect

        if options.threads is None:
            options = replace(options, threads=len(core_cpus()))
        tokenizer = load_tokenizer(
            model, shape=source.shape, revision=source.revision, tokenizer=source.tokenizer, trust_remote_code=trusted
        )
        checked, draft = check(tokenizer), None
        if text is not None:
            check_guesses(text, model, source, tokenizer)
            if text.draft is not None:  # first, so that what is left of the RAM is the model's
                draft, options = load_draft(text.draft, source, options)
                say(f"draft   {text.draft}: {format_bytes(draft_bytes(draft))} of RAM")
        drawn = {} if text is None or source.shape is not None else {"seed": 0}  # then it is the text's alone
        loaded = load(model, **source.to_dict() | drawn, **options.to_dict())
    if (plan := loaded.moestro.gpu_plan) is not None:
        say(plan.in_words())
    if text is not None:
        say_without_effect(text, loaded)
    say_kernels()
    return loaded, tokenizer, draft, checked
