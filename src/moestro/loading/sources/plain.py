"""Unquantized safetensors: which bytes of the mapped files are which weight of a model, proven before any is read.

Transformers' loader is the standard: it renames a checkpoint's tensors, converts some together, and casts them. Here
its own renamings and conversions run first on tensors without values, and for experts on small ones whose numbers say
which weight is which. Where all of that gives the model's parameters, each once and in its shape, the weights can be
taken from the files with the same result. `Unproven` says why not otherwise; such a checkpoint is for Transformers.

Legend: E experts, D model width, F expert neurons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...engine.families import FamilyLayout, expert_modules
from ...errors import MoestroError, first_line
from .base import ExpertWeights, Part
from .names import Pieces, Renamer, alike_sizes, find_experts, small_labels, small_tensors, stored_shape
from .safetensors import open_tensors

_FAULT_BYTES = 1 << 16  # that Linux maps and reads together where one byte is asked for
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Unproven(Exception):
    """Why a checkpoint is left to Transformers' own loader: one line."""


class PlainWeights:
    """The weights of a folder of unquantized safetensors, under a model's names.

    Args:
        model: the Transformers model, on the meta device, made with the dtype that it is loaded with.
        folder: where the files are.

    Raises:
        Unproven: a tensor is not surely where and what Transformers would make of it.
    """

    dense: dict[str, Callable[[], Tensor]]  # parameter or buffer -> what reads it, in the dtype that it is loaded with
    unexpected: list[str]  # what the checkpoint has and the model has no place for, under the model's names

    def __init__(self, model: Any, folder: Path) -> None:
        self._state: dict[str, Tensor] = model.state_dict()
        self._layouts = {name: FamilyLayout.of(name, module) for name, module in expert_modules(model).items()}
        self._cast_to = load_dtypes(model)
        try:
            self._tensors = {name: read() for name, read in open_tensors(folder).items()}
            found = find_experts(model, lambda base: self._full(base) in self._tensors)
        except MoestroError as error:
            raise Unproven(str(error)) from error
        self._experts = {name: self._oriented(pieces, self._layouts[name]) for name, pieces in found.items()}
        renamer = Renamer(model)
        places = {name: renamer.place(name) for name in sorted(self._tensors, key=_natural)}
        known = {name: place for name, place in places.items() if place[0] in self._state}
        of_experts = {f"{name}.{part}" for name, layout in self._layouts.items() for part in layout.parameters}
        experts = {name: place for name, place in known.items() if place[0] in of_experts}
        _prove_experts(renamer, _Small(model, self._labels()), experts, self._sources(), self._tensors)
        self.dense = {}
        self._add_dense(model, renamer, {name: place for name, place in known.items() if name not in experts})
        self._prove_complete(model, of_experts)
        over = {renamed for name, place in places.items() if name not in known for renamed in renamer.renamed(*place)}
        info = SimpleNamespace(missing_keys=set(), unexpected_keys=over)
        model._adjust_missing_and_unexpected_keys(info)
        self.unexpected = sorted(info.unexpected_keys)

    def expert(self, module: str, expert: int) -> ExpertWeights:
        """One expert of the experts module of that name, in the dtype that it is loaded with; views of the files."""
        weights, layout = ExpertWeights(), self._layouts[module]
        first = next(iter(layout.parameters))
        for part in layout.shape.parts:
            piece = self._experts[module][expert, part]
            tensor = self._tensors[self._full(piece.name)]
            tensor = tensor if piece.index is None else tensor[piece.index]
            rows = tensor.T if piece.transposed else tensor
            if piece.rows is not None:
                rows = rows[piece.rows.start : piece.rows.stop : piece.rows.step]
            kind, is_bias = part.removesuffix("_bias"), part.endswith("_bias")
            parameter = f"{'down_proj' if kind == 'down' else first}{'_bias' if is_bias else ''}"
            cast = rows.to(self._cast_to(f"{module}.{parameter}"))
            if is_bias:
                weights.biases[part] = cast
            else:
                weights.matrices[part] = Part(cast)
        return weights

    def fetch(self, module: str) -> None:
        """Have what holds a module's experts read from the disk and mapped, by looking at a byte of each 64 KiB."""
        names = {self._full(piece.name) for piece in self._experts[module].values()}
        for name in sorted(names):
            flat = self._tensors[name].flatten()
            flat.view(torch.uint8)[::_FAULT_BYTES].sum()

    def dtype_of(self, parameter: str) -> torch.dtype:
        """The dtype that a parameter is loaded with."""
        return self._cast_to(parameter)

    def _full(self, base: str) -> str:
        """The checkpoint's name of a tensor, from a name that may lack its ".weight"."""
        return base if base in self._tensors else f"{base}.weight"

    def _oriented(self, pieces: Pieces, layout: FamilyLayout) -> Pieces:
        """Pieces of matrices that are stored as [in, out] instead of [out, in], or the reverse, as their shapes say."""
        shapes = layout.shape.parts
        found = {}
        for (expert, part), piece in pieces.items():
            turned = replace(piece, transposed=not piece.transposed)
            stored = tuple(self._tensors[self._full(piece.name)].shape)
            as_is, as_turned = (stored_shape(each, shapes[part], layout.experts) for each in (piece, turned))
            found[expert, part] = turned if len(shapes[part]) == 2 and stored == as_turned != as_is else piece
        return found

    def _sources(self) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """For each tensor of experts, what stands for it: a small one with labels, and the shape it must have."""
        found: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        for index, (module, pieces) in enumerate(self._experts.items()):
            layout = self._layouts[module]
            for base, (small, shape) in small_tensors(pieces, layout, alike_sizes(layout)).items():
                found[self._full(base)] = (small + (index << 40), shape)
        return found

    def _labels(self) -> dict[str, Tensor]:
        """For each parameter of experts, the small one that its tensors must become."""
        labels: dict[str, Tensor] = {}
        for index, module in enumerate(self._experts):
            layout = self._layouts[module]
            small = small_labels(module, layout, alike_sizes(layout))
            labels |= {name: label + (index << 40) for name, label in small.items()}
        return labels

    def _add_dense(self, model: Any, renamer: Renamer, places: Mapping[str, tuple[str, str | None]]) -> None:
        converted: dict[str, _Converted] = {}
        for name, (target, pattern) in places.items():
            tensor, wanted = self._tensors[name], self._cast_to(target)
            if wanted.is_floating_point and (not tensor.is_floating_point() or tensor.itemsize < 2):
                raise Unproven(f"{name} has weights of {tensor.dtype}")
            if pattern is not None:
                if target not in converted:
                    converted[target] = _Converted(model, target, renamer.converter(pattern))
                converted[target].sources.append((name, pattern, tensor, wanted))
            else:
                self._add(target, tuple(tensor.shape), _Cast(tensor, wanted))
        for group in converted.values():
            for target, shape in group.shapes().items():
                self._add(target, shape, group.reader(target))

    def _add(self, target: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        if target in self.dense:
            raise Unproven(f"several tensors are {target}")
        if target not in self._state or shape != tuple(self._state[target].shape):
            raise Unproven(f"{target} is {list(shape)} in the checkpoint, which is not the model's shape")
        self.dense[target] = read

    def _prove_complete(self, model: Any, of_experts: set[str]) -> None:
        """Each parameter is there once: of tied ones the one that the others are tied to."""
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        if both := sorted(tied.keys() & self.dense.keys()):
            raise Unproven(f"{both[0]} is there, which the config ties to {tied[both[0]]}")
        if missing := sorted(self._state.keys() - self.dense.keys() - of_experts - tied.keys()):
            raise Unproven(f"there is no {missing[0]}")
        if lost := sorted(source for source in tied.values() if source not in self.dense):
            raise Unproven(f"there is no {lost[0]}, which others are tied to")


def load_dtypes(model: Any) -> Callable[[str], torch.dtype]:
    """For each of a model's parameters and buffers, the dtype that Transformers loads it with.

    That is its own on the meta device, but for those that the family keeps in float32.
    """
    state: dict[str, Tensor] = model.state_dict()
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.config.dtype)
    patterns = [(re.compile(pattern.replace("*", ".*")), dtype) for pattern, dtype in plan.items()]

    def cast_to(name: str) -> torch.dtype:
        return next((dtype for pattern, dtype in patterns if pattern.search(name)), state[name].dtype)

    return cast_to


def first_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of a folder's first tensor of floats, which Transformers takes where a config states none."""
    for read in open_tensors(folder).values():
        tensor = read()
        if tensor.is_floating_point() and tensor.itemsize > 1:
            return tensor.dtype
    return None


@dataclass(frozen=True, slots=True)
class _Cast:
    """Reads a tensor of a file in the dtype that it is loaded with; a view of the file where that is its own."""

    tensor: Tensor
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return self.tensor.to(self.dtype)


@dataclass(slots=True)
class _Converted:
    """Tensors that become parameters together, by a conversion of Transformers that runs when the first is read.

    sources: name, pattern, tensor and the dtype that it is cast to first; in the order in which they are converted.
    """

    model: Any
    target: str
    converter: Any
    sources: list[tuple[str, str, Tensor, torch.dtype]] = field(default_factory=list)
    _made: dict[str, Tensor] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters that there will be, and their shapes.

        Raises:
            Unproven: the conversion needs values, or fails.
        """
        on_meta = (
            (name, pattern, torch.empty(tensor.shape, dtype=dtype, device="meta"))
            for name, pattern, tensor, dtype in self.sources
        )
        try:
            return {name: tuple(value.shape) for name, value in self._convert(on_meta).items()}
        except Exception as error:  # a conversion is any code
            raise Unproven(f"the tensors for {self.target} do not convert ({first_line(error)})") from error

    def reader(self, target: str) -> Callable[[], Tensor]:
        """What gives one of the parameters, once."""

        def read() -> Tensor:
            if self._made is None:
                cast = ((name, pattern, tensor.to(dtype)) for name, pattern, tensor, dtype in self.sources)
                self._made = self._convert(cast)
                self.sources = []
            return self._made.pop(target)

        return read

    def _convert(self, sources: Iterator[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        converter = deepcopy(self.converter)
        for name, pattern, tensor in sources:
            converter.add_tensor(self.target, name, pattern, tensor)
        values = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


class _Small:
    """A model as Transformers' conversions see it, whose experts are small tensors of labels."""

    def __init__(self, model: Any, labels: Mapping[str, Tensor]) -> None:
        self._model, self.labels = model, labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Any:
        """The parameter of that name, by whose shape some conversions go."""
        return self.labels[name] if name in self.labels else self._model.get_parameter(name)


def _prove_experts(
    renamer: Renamer,
    model: _Small,
    places: Mapping[str, tuple[str, str | None]],
    sources: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Have Transformers' conversions make the experts of small tensors, and compare.

    Args:
        places: for each tensor of the checkpoint that becomes experts, which parameter, and by which conversion; in
            the order in which they are converted.
        sources: as `PlainWeights._sources`. tensors: of the checkpoint.

    Raises:
        Unproven: an expert's weight would be another one.
    """
    if apart := sorted(sources.keys() ^ places.keys()):
        raise Unproven(f"{apart[0]} is not where the experts of this family are expected")
    found: dict[str, Tensor] = {}
    for name, (target, pattern) in places.items():
        (small, shape), tensor = sources[name], tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in _FLOATS:
            raise Unproven(f"{name} is {tensor.dtype} of {list(tensor.shape)}, where the model needs {list(shape)}")
        if pattern is not None:
            renamer.collect(name, target, pattern, small)
        elif target in found:
            raise Unproven(f"several tensors are {target}")
        else:
            found[target] = small
    try:
        made = dict(renamer.converted(model))
    except MoestroError as error:
        raise Unproven(str(error)) from error
    if doubled := sorted(made.keys() & found.keys()):
        raise Unproven(f"several tensors are {doubled[0]}")
    found |= made
    labels = model.labels
    if found.keys() != labels.keys() or not all(torch.equal(found[name], label) for name, label in labels.items()):
        raise Unproven("this family's experts are converted in a way that is not known here")


def _natural(name: str) -> list[tuple[Any, ...]]:
    """Transformers' order of tensors, in which it stacks those that it converts: numbers by their size."""
    parts: list[tuple[Any, ...]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        parts.append((0, int(part)) if part.isdigit() else (1, text, *([int(digits)] if digits else [])))
    return parts
