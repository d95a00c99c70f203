"""From a GGUF file's metadata to Transformers' config and tokenizer, the config by `gguf_values.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerFast

from ...errors import CheckpointError, MoestroError, first_line
from ...planning.spelling import spelled
from ..gguf_values import name_config, values_of
from .gguf_file import GgufFile

_LIKE_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt")  # names of `tokenizer.ggml.pre` that split text as GPT-2 does


def config_of(file: GgufFile) -> Any:
    """Transformers' config for a file.

    Raises:
        MoestroError: its metadata lacks something, or makes no config.
    """
    values = values_of(file)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except MoestroError:
        raise
    except Exception as error:  # metadata may hold anything
        raise CheckpointError(f"the file's metadata makes no config ({first_line(error)}); {name_config()}") from error


def tokenizer_of(path: Path, file: GgufFile) -> Any:
    """The tokenizer that a file describes, by Transformers' own conversion.

    Raises:
        CheckpointError: it describes none, or one that splits text in a way that Transformers has no rule for.
    """
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise CheckpointError(f"{path.name} has no tokenizer; {_name_tokenizer()}")
    split = file.metadata.get("tokenizer.ggml.pre")
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        known = split in GGUF_PRE_TOKENIZER_SPLITS or split in _LIKE_GPT2
        if file.metadata.get("tokenizer.ggml.model") == "gpt2" and not known:
            raise CheckpointError(
                f"{path.name} splits text as {split!r}, for which there is no rule; {_name_tokenizer()}"
            )
        architecture, values, settings = get_gguf_tokenizer(str(path))
        backend, _ = convert_gguf_tokenizer(architecture, values)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    except CheckpointError:
        raise
    except Exception as error:  # a tokenizer's data may be anything
        raise CheckpointError(
            f"{path.name} has a tokenizer that Transformers cannot make ({first_line(error)}); {_name_tokenizer()}"
        ) from error


def _name_tokenizer() -> str:
    return f"name a checkpoint with the same tokenizer by {spelled('tokenizer', 'ORG/REPO')}"
