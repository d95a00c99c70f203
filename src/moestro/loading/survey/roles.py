"""Which tensor of a checkpoint is what: a layer's experts, a matrix that is packed, or a weight that stays in torch.

By names and shapes, as the families of docs/models.md write them; tests compare it with the models of all of them.

Legend: E experts, D model width, F expert neurons, R rows, K columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import CheckpointError, ModelError
from ...planning.expert_sizes import ExpertShape
from .found import DenseWeight, ExpertLayer

_ONE = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")  # a matrix of one expert
_STACKED = re.compile(r"(.*\bexperts)\.([^.]+?(?:\.weight)?)|(.*\bblock_sparse_moe)\.((?:in|out)put_linear)")
_IS_DOWN = re.compile(r"\bdown|\bw2|fc2|output")
_NOT_ROUTED = re.compile(r"shared_?experts?\b")
_ROUTER = re.compile(r"(^|\.)(gate|router|wg)$|router\.(layer|gate)$")
_HEAD = re.compile(r"(^|\.)(lm_head|head|output|unembed|embed_out)$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|tok_embeddings|embed|wte|token_embd)$|backbone\.embeddings$"
)
TOWER = re.compile(r"vision|visual|audio|speech|talker|code2wav|tower|sam_model")
# Matrices that no linear layer has: tables that are looked up, and layers of a kind of their own.
_IN_TORCH = re.compile(
    r"embed_tokens_per_layer|pos_emb|position_embedding|pos_embed|ngram_embedding|\bquery_\d+|audio\.encoder|"
    r"multihead_attn\.out_proj|\bwo_a$|\bmtp\b"
)
_PREDICTS_MORE = re.compile(r"^(model\.)?mtp\b|\.mtp\.")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight of a checkpoint, its scales and the like being part of it.

    name: without "weight". ending: of its own tensor. format: of a quantized one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    ending: str = "weight"
    format: str | None = None


def sort_out(
    model: str,
    matrices: Iterable[Matrix],
    config: Mapping[str, Any],
    family: Mapping[str, Any],
    text: Mapping[str, Any],
) -> tuple[tuple[ExpertLayer, ...], tuple[DenseWeight, ...]]:
    """Tell experts from the rest.

    Raises:
        ModelError: there are no experts. CheckpointError: some are not there.
    """
    unused = [re.compile(pattern) for pattern in family.get("unused", ())]
    depth = text.get("num_hidden_layers") or 0
    experts: dict[str, dict[str, list[Matrix]]] = {}
    dense: list[Matrix] = []
    for one in matrices:
        full, layer = f"{one.name}.{one.ending}", _LAYER.search(one.name)
        beyond = bool(layer and depth and int(layer[1]) >= depth and not TOWER.search(one.name))
        if beyond or _PREDICTS_MORE.search(full):  # layers that predict several tokens at once
            continue
        if not layer and any(pattern.search(full) for pattern in unused):
            continue
        place = None if _NOT_ROUTED.search(one.name) else _place(one)
        if place is None:
            dense.append(one)
        else:
            experts.setdefault(place[0], {}).setdefault(place[1], []).append(replace(one, name=place[2]))
    layers = tuple(layer for name, parts in experts.items() for layer in _layers(model, name, parts))
    if not layers:
        raise ModelError(f"{model} has no experts by the names of its tensors: it is a dense model, or not known here")
    return layers, (*_dense(dense, config, family), *_tables(config))


def _tables(config: Mapping[str, Any]) -> list[DenseWeight]:
    """Large float32 tables that a model makes itself: the positions of Qwen's audio encoder."""
    audio = config.get("audio_config")
    if not isinstance(audio, Mapping) or "omni" not in str(config.get("model_type")):
        return []
    count = (audio.get("max_source_positions") or 1500) * (audio.get("d_model") or 0)
    return [DenseWeight("audio positions", count, item_bytes=4)]


def _place(one: Matrix) -> tuple[str, str, str] | None:
    """Where a matrix of experts belongs: the experts' module, which expert ("" of stacked ones), and which matrix."""
    if (found := _ONE.fullmatch(one.name)) is not None:
        return found[1], found[2], found[3]
    if (found := _STACKED.fullmatch(one.name)) is None or (found[3] and len(one.shape) != 3):
        return None
    return found[1] or found[3], "", found[2] or found[4]


def _layers(model: str, name: str, experts: Mapping[str, Sequence[Matrix]]) -> list[ExpertLayer]:
    """The experts of a module; several kinds of them where their sizes differ, as where text and images have theirs."""
    if any(len(one.shape) == 3 for one in experts.get("", ())):
        return [_stacked(model, name, experts[""])]
    kinds: dict[ExpertLayer, int] = {}
    for parts in (of for expert, of in experts.items() if expert):
        weights = {one.name: one for one in parts if len(one.shape) == 2}
        kind = _kind(model, name, weights, any("bias" in (one.ending, one.name) for one in parts))
        kinds[kind] = kinds.get(kind, 0) + 1
    return [replace(kind, experts=count) for kind, count in kinds.items()]


def _kind(model: str, module: str, weights: Mapping[str, Matrix], has_bias: bool) -> ExpertLayer:
    down = next((one for name, one in weights.items() if _IS_DOWN.search(name)), None)
    first = [one for one in weights.values() if one is not down]
    if down is None or not first or len(first) > 2:
        raise CheckpointError(f"{model}: {module} has {', '.join(sorted(weights))}, which are no experts known here")
    hidden, neurons = down.shape
    has_gate = len(first) == 2 or first[0].shape[0] == 2 * neurons
    formats = [one.format for one in (first[0], first[-1], down)]
    return ExpertLayer(1, ExpertShape(hidden, neurons, has_gate, has_bias), _joined(formats))


def _stacked(model: str, module: str, parts: Sequence[Matrix]) -> ExpertLayer:
    """Experts in tensors [E, R, K]; with a gate in the same tensor as up, or apart from it; transposed or not."""
    weights = [one for one in parts if len(one.shape) == 3]
    down = next((one for one in weights if _IS_DOWN.search(one.name)), None)
    first = [one for one in weights if one is not down]
    if down is None or not first:
        raise CheckpointError(f"{model}: {module} lacks a matrix of its experts; it is incomplete")
    _, a, b = down.shape
    rows, columns = first[0].shape[1:]
    hidden, neurons = (a, b) if columns == a and rows in (b, 2 * b) else (b, a)
    has_gate = len(first) == 2 or (
        max(rows, columns) // neurons * neurons != neurons and 2 * neurons in (rows, columns)
    )
    has_bias = any(one.name.endswith("bias") or one.ending == "bias" for one in parts)
    formats = [one.format for one in (first[0], first[-1], down)]
    post_norm = any("norm" in one.name for one in parts)
    return ExpertLayer(down.shape[0], ExpertShape(hidden, neurons, has_gate, has_bias), _joined(formats), post_norm)


def _joined(formats: Sequence[str | None]) -> str | None:
    """The name of a format of experts from those of gate, up and down."""
    kinds = [name for name in formats if name is not None]
    return None if not kinds else kinds[0] if len({*kinds}) == 1 else "+".join(kinds)


def _dense(matrices: Iterable[Matrix], config: Mapping[str, Any], family: Mapping[str, Any]) -> tuple[DenseWeight, ...]:
    found = [_role(one, family) for one in matrices]
    tied = bool(config.get("tie_word_embeddings")) and not family.get("never_ties")
    has_embedding = any(one.is_embedding for one in found)
    if tied and has_embedding:  # one matrix, which the head multiplies with
        found = [one for one in found if one.is_embedding or not one.is_head]
    if tied or not any(one.is_head and not one.is_embedding for one in found):
        found = [replace(one, is_embedding=False) for one in found]
    return tuple(found)


def _role(one: Matrix, family: Mapping[str, Any]) -> DenseWeight:
    count = math.prod(one.shape)
    item = _OTHER_BYTES.get(one.dtype, 0)
    in_tower = TOWER.search(one.name) is not None
    is_embedding = not in_tower and _EMBEDDING.search(one.name) is not None
    is_head = is_embedding or (not in_tower and _HEAD.search(one.name) is not None and len(one.shape) == 2)
    packs = (
        one.ending == "weight"
        and len(one.shape) == 2
        and not item
        and not _ROUTER.search(one.name)
        and not _IN_TORCH.search(one.name)
        and not (is_head and family.get("embedding_in_torch") and is_embedding)
    )
    size = (one.shape[0], one.shape[1]) if packs else None
    return DenseWeight(f"{one.name}.{one.ending}", count, size, item, one.format, is_head, is_embedding)


_OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
