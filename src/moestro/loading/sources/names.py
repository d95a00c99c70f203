"""Under which names a checkpoint holds a model's weights, by Transformers' own conversions.

Experts: the conversions are run backwards on small tensors whose numbers say which weight is which. So the names
and orders of every family that Transformers converts follow, and there is no table of families here.
Other weights: `Renamer` runs the conversions forwards, as Transformers' loader does.

Legend: E experts, D model width, F expert neurons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from ...engine.families import FamilyLayout, expert_modules
from ...errors import CheckpointError, ModelError, first_line

_NEURONS, _WIDTH = 4, 3  # of the small tensors; different, so that a transposed matrix is recognized
_SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # of experts that are stored one by one
_PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one matrix or bias of one expert stands in a checkpoint.

    name: the tensor's name, without a matrix's ending ".weight".
    index: which of the experts that the tensor stacks; None where it holds one expert.
    rows: which of its output features are this part's; None where all are.
    shared: how many parts of an expert share the tensor's output features.
    transposed: whether weights are stored [in, out]; where a checkpoint's shapes say otherwise, they are right.
    """

    name: str
    index: int | None = None
    rows: range | None = None
    shared: int = 1
    transposed: bool = False


Pieces = dict[tuple[int, str], Piece]  # (expert, part as in `ExpertShape.parts`) -> where it is


def find_experts(model: Any, has: Callable[[str], bool]) -> dict[str, Pieces]:
    """Where a checkpoint holds each expert, by the name of its experts module.

    Args:
        model: the Transformers model; its weights may be on the meta device.
        has: whether the checkpoint has a tensor of that name (a matrix's without ".weight").

    Raises:
        ModelError: the model keeps its experts in a way that is not known.
        CheckpointError: an expert is not there.
    """
    layouts = {name: FamilyLayout.of(name, module) for name, module in expert_modules(model).items()}
    found = {}
    for name, published in _published(model, layouts).items():
        layout = layouts[name]
        own = _trace(small_labels(name, layout), layout)
        candidates = _candidates(name, published, own, model.base_model_prefix)
        found[name] = _fullest(candidates, has)
        lacking = sorted({piece.name for piece in found[name].values() if not has(piece.name)})
        if lacking:
            more = f" and {len(lacking) - 1} more tensors of its experts" if len(lacking) > 1 else ""
            raise CheckpointError(f"the checkpoint has no {lacking[0]}{more}; it is incomplete: download it again")
    return found


def _fullest(candidates: Iterable[Pieces], has: Callable[[str], bool]) -> Pieces:
    """The first of which all is there, or else the first of which most is."""
    best, most = Pieces(), -1
    for pieces in candidates:
        count = sum(has(piece.name) for piece in pieces.values())
        if count == len(pieces):
            return pieces
        if count > most:
            best, most = pieces, count
    return best


def _published(model: Any, layouts: Mapping[str, FamilyLayout]) -> dict[str, Pieces]:
    """The names and orders that Transformers would save the experts under.

    Raises:
        ModelError: its conversion cannot be run backwards.
    """
    labels: dict[str, Tensor] = {}
    for index, (name, layout) in enumerate(layouts.items()):
        labels |= {key: label + (index << 40) for key, label in small_labels(name, layout).items()}
    try:
        saved = revert_weight_conversion(model, labels)
    except Exception as error:  # a conversion is any code
        kind = model.config.model_type
        raise ModelError(f"Transformers cannot say how {kind} stores its experts ({first_line(error)})") from error
    of_module: dict[str, dict[str, Tensor]] = {name: {} for name in layouts}
    for key, label in saved.items():
        name = list(layouts)[int(label.flatten()[0]) >> 40]
        of_module[name][key] = label & ((1 << 40) - 1)
    return {name: _trace(labels, layouts[name]) for name, labels in of_module.items()}


def alike_sizes(layout: FamilyLayout) -> tuple[int, int]:
    """A small width and few neurons, for which the matrices are square that are square in the model, and no others."""
    hidden, neurons = layout.shape.hidden, layout.shape.neurons
    return {neurons: _NEURONS, 2 * neurons: 2 * _NEURONS}.get(hidden, _WIDTH), _NEURONS


def small_labels(name: str, layout: FamilyLayout, sizes: tuple[int, int] = (_WIDTH, _NEURONS)) -> dict[str, Tensor]:
    """The parameters of an experts module, of few neurons and little width, each weight a number that says what it is.

    A number is ((expert * 6 + part) * neurons + neuron) * width + column; a down matrix counts columns and rows
    the other way round.
    """
    width, neurons = sizes
    small = replace(layout, shape=replace(layout.shape, hidden=width, neurons=neurons))
    labels = {}
    for parameter, shape in small.parameters.items():
        label = torch.zeros((layout.experts, *shape), dtype=torch.int64)
        for expert in range(layout.experts):
            for part, view in small.parts(parameter, label[expert]).items():
                first = (expert * 6 + _PARTS.index(part)) * neurons * width
                view.copy_(torch.arange(first, first + view.numel()).view(view.shape))
        labels[f"{name}.{parameter}"] = label
    return labels


def small_tensors(
    pieces: Pieces, layout: FamilyLayout, sizes: tuple[int, int]
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """The tensors that pieces are in, as small as those of `small_labels`, with its numbers as they should stand there.

    Returns:
        The tensor's name, as in `Piece` -> the small one, int64, and the shape that the checkpoint's must have.
    """
    width, neurons = sizes
    small = replace(layout.shape, hidden=width, neurons=neurons).parts
    found: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for (expert, part), piece in pieces.items():
        if piece.name not in found:
            shapes = (stored_shape(piece, parts[part], layout.experts) for parts in (small, layout.shape.parts))
            found[piece.name] = torch.full(next(shapes), -1, dtype=torch.int64), next(shapes)
        label = found[piece.name][0]
        at = label if piece.index is None else label[piece.index]
        rows = at.T if piece.transposed else at  # of a matrix [out, in], or a bias [out]
        which = _scaled(piece.rows, layout.shape.parts[part][0], small[part][0])
        target = rows[which.start : which.stop : which.step]
        first = (expert * 6 + _PARTS.index(part)) * neurons * width
        target.copy_(torch.arange(first, first + target.numel()).view(target.shape))
    return found


def stored_shape(piece: Piece, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """The shape of a piece's tensor. shape: of the part, as in `ExpertShape.parts`."""
    one = (shape[0] * piece.shared, *shape[1:])
    one = one[::-1] if piece.transposed else one
    return one if piece.index is None else (experts, *one)


def _scaled(rows: range | None, size: int, count: int) -> range:
    """The rows of a part of `size` rows, in a tensor whose parts have `count` instead."""
    if rows is None:
        return range(count)
    start = rows.start // size * count if rows.step == 1 else rows.start
    return range(start, start + count * rows.step if rows.step == 1 else rows.stop // size * count, rows.step)


def _trace(labels: Mapping[str, Tensor], layout: FamilyLayout) -> Pieces:
    """Read from labels, as a conversion has arranged them, where each part of each expert went.

    Raises:
        ModelError: a part is not one run, or every other one, of a tensor's rows.
    """
    pieces: Pieces = {}
    for key, label in labels.items():
        parts = label // (_NEURONS * _WIDTH)
        is_bias = int(parts.flatten()[0]) % 6 > 2
        stacked = label.dim() == (2 if is_bias else 3)
        for index, one in enumerate(label if stacked else label[None]):
            # A matrix counts up along its columns, unless it is transposed.
            transposed = not is_bias and int(one[1, 0] - one[0, 0]) == 1
            rows = one if is_bias else (one.T if transposed else one)[:, 0]  # a number for each output feature
            for code in (rows // (_NEURONS * _WIDTH)).unique().tolist():
                expert, part = code // 6, _PARTS[code % 6]
                found = (rows // (_NEURONS * _WIDTH) == code).nonzero().flatten().tolist()
                name = key if is_bias else key.removesuffix(".weight")
                where = _rows(found, len(rows), layout.shape.parts[part][0])
                pieces[expert, part] = Piece(
                    name, index if stacked else None, where, len(rows) // len(found), transposed
                )
    return pieces


def _rows(found: list[int], of: int, size: int) -> range | None:
    """The rows of a part of `size` rows, from the places that its few have among the `of` rows of a label."""
    count, step = len(found), found[1] - found[0]
    if count == of:
        return None
    if found != list(range(found[0], found[0] + count * step, step)) or step * count not in (count, of):
        raise ModelError("the rows of this family's experts are stored in an order that is not known")
    start = found[0] // count * size if step == 1 else found[0]
    return range(start, start + size if step == 1 else of // count * size, step)


def _candidates(name: str, published: Pieces, own: Pieces, base: str) -> Iterator[Pieces]:
    """The names that a checkpoint may have: those of the model, as Transformers saves it, and experts one by one."""
    yield own
    yield published
    prefixes = {re.sub(r"(experts)\b.*", r"\1", next(iter(published.values())).name), name}
    for prefix in sorted(prefixes):
        for gate, up, down in _SPELLINGS:
            spelled = {"gate": gate, "up": up, "down": down}
            yield {
                (expert, part): Piece(f"{prefix}.{expert}.{spelled[part.removesuffix('_bias')]}" + _bias(part))
                for expert, part in own
            }
    # Some checkpoints are of the model without its head.
    for pieces in (published, own):
        yield {key: replace(piece, name=piece.name.removeprefix(f"{base}.")) for key, piece in pieces.items()}


def _bias(part: str) -> str:
    return ".bias" if part.endswith("_bias") else ""


class Renamer:
    """From a checkpoint's tensors to the model's parameters, as Transformers' loader converts them."""

    def __init__(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model)
        self._model = model
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._wanted = model.state_dict()
        self._waiting: dict[str, Any] = {}  # name of the first parameter -> a converter that collects

    def rename(self, name: str) -> tuple[str, str | None] | None:
        """The parameter that a tensor becomes, with the conversion's pattern where it takes more than a new name.

        None where the model has no such parameter.
        """
        found = self.place(name)
        return found if found[0] in self._wanted else None

    def place(self, name: str) -> tuple[str, str | None]:
        """As `rename`, for a tensor that the model may have no place for."""
        base = self._model.base_model_prefix
        found: tuple[str, str | None] = rename_source_key(name, self._renamings, self._converters, base, self._wanted)
        if found[0] not in self._wanted and name in self._wanted:
            found = rename_source_key(name, [], [], base, self._wanted)
        return found

    def renamed(self, target: str, pattern: str | None) -> set[str]:
        """The names of all parameters that a tensor would become that the model has no place for."""
        if pattern is None:
            return {target}
        targets = self._by_pattern[pattern].target_patterns
        return {target.replace(targets[0], each) for each in targets}

    def converter(self, pattern: str) -> Any:
        """Transformers' conversion of a pattern, which has collected nothing."""
        return deepcopy(self._by_pattern[pattern])

    def collect(self, name: str, target: str, pattern: str, tensor: Tensor) -> None:
        """Keep a tensor that a conversion needs; `converted` gives what becomes of all."""
        if target not in self._waiting:
            self._waiting[target] = self.converter(pattern)
        self._waiting[target].add_tensor(target, name, pattern, tensor)

    def converted(self, model: Any = None) -> Iterator[tuple[str, Tensor]]:
        """The parameters that conversions give of the tensors that were collected.

        Args:
            model: what conversions see in place of the model.

        Raises:
            CheckpointError: tensors are not all there or do not fit together.
        """
        for target, converter in self._waiting.items():
            try:
                values = converter.convert(target, model=model or self._model, config=self._model.config)
            except Exception as error:  # a conversion is any code
                raise CheckpointError(
                    f"the tensors for {target} are not all there or do not fit together ({first_line(error)})"
                ) from error
            for name, value in values.items():
                yield name, value[0] if isinstance(value, list) else value
        self._waiting.clear()
