"""Load a model or a tokenizer by its name: `moestro.load` and `moestro.load_tokenizer`.

Options are checked here, before torch and Transformers are imported: a wrong one answers at once. `model.py` loads.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..planning.option import check_names, shows_options
from ..planning.options import ModelOptions, Options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@shows_options(ModelOptions, Options)
def load(model: str | None = None, **options: Any) -> PreTrainedModel:
    """Load a Mixture-of-Experts model whose experts Moestro stores and computes.

    Args:
        model: a folder, a hub id, or "demo", the small model that ships with the package.
        {options}

    `dtype` may be torch's own, too. `threads` also sets torch's own threads, for the whole process; None leaves them
    as they are.

    Returns:
        The Transformers model, in eval mode; its conductor is the attribute `moestro`.

    Raises:
        MoestroError: one line on what was found, what was needed and what to do.
    """
    of_source = [one.name for one in fields(ModelOptions)]
    check_names(options, [*of_source, *(one.name for one in fields(Options))])
    if f"{type(dtype := options.get('dtype')).__module__}.{type(dtype).__name__}" == "torch.dtype":
        options["dtype"] = str(dtype).removeprefix("torch.")
    source = ModelOptions(**{name: options.pop(name) for name in of_source if name in options})
    checked = Options(**options)
    if (model is None) == (source.shape is None):
        raise RequestError("name one model: a folder, a hub id, demo, or a shape with random weights")
    from .model import load_model

    return load_model(model, source, checked)


def load_tokenizer(
    model: str | None = None,
    *,
    shape: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or one that writes ids as text for a random shape.

    Args:
        model: a folder, a hub id, or "demo". shape: the name of a random shape, instead of a model.
        revision: of a hub id, the branch, tag or commit.
        tokenizer: another model whose tokenizer to take; None for the model's own.
        trust_remote_code: run code that the checkpoint brings for it. Without it, no such code is run.

    Raises:
        CheckpointError: the checkpoint has none. ModelError: it needs code that is not trusted.
    """
    from .model import tokenizer_of

    return tokenizer_of(model, shape=shape, revision=revision, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
