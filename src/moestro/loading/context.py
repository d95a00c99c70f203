"""The context that a model was made for: its config's `max_position_embeddings`, as its RoPE extends it.

Transformers refuses no length in the families that Moestro runs: beyond the context the text gets bad without an error.

    >>> from transformers import Qwen3MoeConfig
    >>> yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> model_context(Qwen3MoeConfig(max_position_embeddings=32768, rope_parameters=yarn))
    131072
"""

from __future__ import annotations

from typing import Any

from ..planning.text_shape import context_of


def model_context(config: Any) -> int | None:
    """The most tokens of prompt and answer together; None where the config names no length.

    Args:
        config: of a text model, or of a model with a text model inside.
    """
    return context_of(config.get_text_config().to_dict())
