"""How many tokens a model's positions are made for: its config's `max_position_embeddings`, as its RoPE extends it.

Transformers itself refuses no length in the families that Moestro runs; beyond this one it gives text that the
model was not made for. Knows neither prompts nor memory.

    model_context(config)        # 131072 for max_position_embeddings 32768 with YaRN by a factor of 4
"""

from __future__ import annotations

from typing import Any


def model_context(config: Any) -> int | None:
    """The most tokens of prompt and answer together; None where the config names no length.

    Every kind of RoPE scaling stretches the length that it was trained with, `original_max_position_embeddings`, by
    its `factor`. Some checkpoints write the stretched length into `max_position_embeddings`, some leave it as it was,
    so the context is the longer of the two.

    Args:
        config: of a model, or of the whole around a text model.
    """
    text = config.get_text_config()
    named: int | None = getattr(text, "max_position_embeddings", None)
    if not named:
        return None
    lengths = [named]
    for rope in _ropes(text):
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or named
        if factor and rope.get("rope_type", rope.get("type")) != "default":  # which knows no factor
            lengths.append(int(original * factor))
    return max(lengths)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a config: one dict, or one for each type of layer that has any."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
