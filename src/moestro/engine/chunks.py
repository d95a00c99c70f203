"""Whether a model reads a prompt in chunks, and in which: as large as memory allows when the prompt comes.

Transformers' `generate` cuts and appends (`prefill_chunk_size`); each chunk is a call of the model like any other, so
an expert is read, or crosses the link, once a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..machine.probe import available_ram_bytes
from ..planning.chunks import LEAST_CHUNK, MOST_IN_RAM, RAM_SHARE, largest_chunk
from ..planning.text_shape import text_shape

# Families for which Transformers 5.23 itself gives wrong logits when several tokens are appended to a filled cache
# (mistral_large4 from 20 tokens on). They read a prompt whole, and a chat's history again in each turn. The family
# tests try all families.
REREAD = frozenset({"jamba", "mistral_large4", "unlimited_ocr"})

_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "experts_per_token")
_PARTS = 16  # at most, into which the CPU's kernels cut an expert's neurons, each with a float32 result of its own
# What may be beside the token ids: a call with anything else, images for instance, is not cut.
_PLAIN = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position")
)


def can_be_chunked(model: Any) -> bool:
    """Whether a model of this family computes the same for a prompt that is appended piece by piece."""
    return (
        model.config.model_type not in REREAD
        and not model.config.is_encoder_decoder
        and not follows_length(model.config)
        and hasattr(model, "_supports_default_dynamic_cache")
        and model._supports_default_dynamic_cache()
    )


def follows_length(config: Any) -> bool:
    """Whether positions are written otherwise once a text is long, by the longest row of a call.

    Rows of other lengths, and keys that were read in a shorter text, would then not be what they are alone.
    """
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [one.get("rope_type") for one in (given, *given.values()) if isinstance(one, dict)]  # of layers, too
    return any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)


def chunk_for(model: Any, input_ids: torch.Tensor, given: Mapping[str, Any]) -> int | None:
    """How many tokens of each row are read at a time; None where all are.

    Args:
        input_ids: int64 [rows, tokens], of the whole text so far, or of what the cache lacks.
        given: the other arguments of the model.
    """
    cache = given.get("past_key_values")
    others = [value for key, value in given.items() if key not in _PLAIN]
    if cache is None or not can_be_chunked(model):
        return None
    if not all(value is None or isinstance(value, bool) or value == {} for value in others):
        return None
    rows, length = input_ids.shape
    mask, past, plan = given.get("attention_mask"), int(cache.get_seq_length()), model.moestro.gpu_plan
    is_whole = mask is None or mask.shape[-1] == length
    new, length = (length - past, length) if is_whole else (length, past + length)
    if plan is not None:
        chunk = plan.chunk and max(1, plan.chunk // rows)
    else:
        chunk = ram_chunk(model, rows, new, length, free_ram(model.moestro))
    return chunk if chunk and chunk < new else None


def ram_chunk(model: Any, rows: int, new: int, context: int, free_bytes: int) -> int:
    """How many tokens of each row a model on the CPU may read at a time.

    Args:
        new: tokens of a row to read. context: tokens of a row in the end. free_bytes: of RAM, see `free_ram`.
    """
    config, spec = model.config.get_text_config(), model.moestro.spec
    top_k = next((value for name in _TOP_K if isinstance(value := getattr(config, name, None), int)), 8)
    hidden = max(layer.hidden for layer in spec.layers)
    shape = text_shape(model.config.to_dict(), model.dtype.itemsize)
    most = new * rows if model.moestro.slots else min(new * rows, MOST_IN_RAM)

    def fits(chunk: int) -> bool:
        need = shape.footprint(context, lambda tokens: 4 * tokens * hidden * top_k * _PARTS, chunk=chunk)
        return need.kv_bytes * rows + need.prefill_bytes <= free_bytes * RAM_SHARE

    return max(1, min(new, largest_chunk(max(LEAST_CHUNK, most), fits) // rows))


def free_ram(conductor: Any) -> int:
    """Bytes of RAM that a prompt may take: those that are free, and no more than a budget leaves beside the model."""
    free_bytes, named_bytes = available_ram_bytes(), conductor.ram_budget_bytes
    if named_bytes is None:
        return free_bytes
    used_bytes = conductor.store.n_bytes + (0 if conductor.device.dense_on_gpu else conductor.spec.dense_bytes)
    return int(min(free_bytes, max(0, named_bytes - used_bytes)))
