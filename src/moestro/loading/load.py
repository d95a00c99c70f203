"""Load a model or a tokenizer by its name: `moestro.load` and `moestro.load_tokenizer`.

Options are checked here, before torch and Transformers are imported: a wrong one answers at once. `model.py` loads.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..planning.option import check_names, shows_options
from ..planning.options import ModelOptions, Options
from .access import Access, accessing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@shows_options(ModelOptions, Options)
def load(model: str | None = None, **options: Any) -> PreTrainedModel:
    """Load a Mixture-of-Experts model whose experts Moestro stores and computes.

    Args:
        model: a folder, a hub id, or "demo", the small model that ships with the package.
        {options}

    `dtype` and `device` may be torch's own, too, of GPUs the first. `policy` may be an object of a class derived from
    `BasePolicy`, one for each model. `threads` also sets torch's own threads, for the whole process; None leaves them
    as they are.

    Returns:
        The Transformers model, in eval mode; its conductor is the attribute `moestro`.

    Raises:
        MoestroError: one line on what was found, what was needed and what to do.
    """
    of_source = [one.name for one in fields(ModelOptions)]
    check_names(options, [*of_source, *(one.name for one in fields(Options))])
    source = ModelOptions(**{name: options.pop(name) for name in of_source if name in options})
    checked = Options(**options)
    _check_one(model, source)
    from .model import load_model

    with accessing(Access(source.token, source.cache_dir, source.local_files_only)):
        return load_model(model, source, checked)


def load_tokenizer(
    model: str | None = None,
    *,
    shape: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or one that writes ids as text for a random shape.

    Args:
        model: a folder, a hub id, or "demo". shape: the name of a random shape, instead of a model.
        revision: of a hub id, the branch, tag or commit.
        tokenizer: another model whose tokenizer to take; None for the model's own.
        trust_remote_code: run code that the checkpoint brings for it. Without it, no such code is run.
        token, cache_dir, local_files_only: as for `load`.

    Raises:
        CheckpointError: the checkpoint has none. ModelError: it needs code that is not trusted.
    """
    given: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    source = ModelOptions(
        shape=shape, revision=revision, tokenizer=tokenizer, trust_remote_code=trust_remote_code, **given
    )
    _check_one(model, source)
    from .model import tokenizer_of

    with accessing(Access(source.token, source.cache_dir, source.local_files_only)):
        return tokenizer_of(
            model, shape=shape, revision=revision, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )


def _check_one(model: str | None, source: ModelOptions) -> None:
    if (model is None) == (source.shape is None):
        raise RequestError("name one model: a folder, a hub id, demo, or a shape with random weights")
