"""Folders of safetensors, quantized or not: config.json, tokenizer and one or many files, mapped into memory.

Tensors are views of the mapped files. Matrices are put together from tensors by `layouts`, found by `names`.

Legend: R rows, K columns, F expert neurons.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...engine.families import FamilyLayout, expert_modules
from ...errors import CheckpointError, ModelError, first_line
from ..checkpoint import names_of_files, read_config, weight_files
from ..headers import prefix_of
from ..quantization import Quantization
from .base import ExpertWeights, Part, floats_of, ordered, row_index, tokenizer_from
from .hqq import by_class
from .layouts import WEIGHTS, Matrix, read_matrix, split_name
from .names import Piece, Renamer, find_experts

logger = logging.getLogger("moestro")


class SafetensorsSource:
    """A checkpoint's folder.

    Args:
        model: what the user called it, for errors.
        folder: where it is.
        config, tokenizer: a folder or hub id to take the config or the tokenizer from instead.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        *,
        config: str | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._folder, self._trust = folder, trust_remote_code
        self._tokenizer_from = tokenizer or str(folder)
        self._config = read_config(model, str(folder), trust_remote_code, quantized=True)
        self.quantization = Quantization.taken_off(model, self._config)
        if config is not None:
            self._config = read_config(config, config, trust_remote_code, quantized=True)
            Quantization.taken_off(config, self._config)

    @property
    def method(self) -> str | None:
        return self.quantization.method or None

    def config(self) -> Any:
        return self._config

    def tokenizer(self) -> Any:
        return tokenizer_from(self._tokenizer_from, self._trust)

    def weights(self, model: Any) -> SafetensorsWeights:
        return SafetensorsWeights(model, open_tensors(self._folder), self.quantization)


def open_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Each tensor of a folder's files by name, as a function that gives a view of the mapped file.

    Raises:
        CheckpointError: a file is absent, damaged or cut short, or no safetensors.
    """
    tensors: dict[str, Callable[[], Tensor]] = {}
    indexed = names_of_files(folder)
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is a pickle; save the model as safetensors")
        try:
            opened = safe_open(path, framework="pt")
            names: list[str] = opened.keys()  # type: ignore[no-untyped-call]
            before = prefix_of(names, indexed.get(path.name, ()))
            tensors |= {f"{before}{name}": functools.partial(opened.get_tensor, name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({first_line(error)}); download it again") from error
    if not tensors:
        raise CheckpointError(f"{folder} has no weights: no model.safetensors and no index of several")
    return tensors


class SafetensorsWeights:
    """The weights of a folder, under a model's names."""

    def __init__(self, model: Any, tensors: Mapping[str, Callable[[], Tensor]], quantization: Quantization) -> None:
        self._model, self._quantization, self._tensors = model, quantization, tensors
        self._groups = group_names(tensors)
        modules = expert_modules(model)
        self._layouts = {name: FamilyLayout.of(name, module) for name, module in modules.items()}
        self._experts = find_experts(model, self._groups.__contains__)

    def expert(self, module: str, expert: int) -> ExpertWeights:
        layout, pieces = self._layouts[module], self._experts[module]
        weights = ExpertWeights()
        for part, shape in layout.shape.parts.items():
            piece = pieces[expert, part]
            if part.endswith("_bias"):
                weights.biases[part] = self._bias(piece, shape[0] * piece.shared)
                continue
            matrix = self._matrix(piece, (shape[0] * piece.shared, shape[1]), layout.experts)
            rows = None if piece.rows is None else row_index(piece.rows)
            weights.matrices[part] = Part(matrix.raw, rows, matrix.columns)
        return ordered(by_class(module, weights))

    def dense(self) -> Iterator[tuple[str, Tensor | Part]]:
        renamer, unused, joined = Renamer(self._model), list[str](), 0
        state: dict[str, Tensor] = self._model.state_dict()
        experts = {piece.name for pieces in self._experts.values() for piece in pieces.values()}
        missing = {name for name in state if not name.startswith(tuple(f"{module}." for module in self._experts))}
        missing -= set(getattr(self._model, "all_tied_weights_keys", None) or {})
        for base, endings in self._groups.items():
            if base in experts:
                continue
            for name, quantized in self._units(base, endings):
                found = renamer.rename(name)
                if found is None:  # such as layers that predict several tokens at once
                    unused.append(name)
                    continue
                target, pattern = found
                if pattern is None:
                    missing.discard(target)
                    value = self._quantized(base, state[target]) if quantized else self._tensors[name]()
                    yield target, _fitting(target, value, state)
                    continue
                value = self._floats(base, target) if quantized else self._tensors[name]()
                joined += quantized
                renamer.collect(name, target, pattern, value.to(state[target].dtype) if quantized else value)
        for target, converted in renamer.converted():
            missing.discard(target)
            yield target, _fitting(target, converted, state)
        if joined:
            logger.warning("%d quantized matrices are parts of larger ones here, and are kept as floats", joined)
        if unused:
            logger.warning("the config has no place for %d tensors, such as %s", len(unused), min(unused))
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise CheckpointError(f"the checkpoint has no {min(missing)}{more}; it is incomplete: download it again")

    def _matrix(self, piece: Piece, shape: tuple[int, int], experts: int) -> Matrix:
        tensors = self._read(piece.name)
        if piece.index is not None:
            tensors = {ending: _one(piece.name, one, piece.index, experts) for ending, one in tensors.items()}
        if piece.transposed and (weight := tensors.get("weight")) is not None and tuple(weight.shape) == shape[::-1]:
            tensors["weight"] = weight.T
        return read_matrix(piece.name, tensors, shape, self._quantization)

    def _units(self, base: str, endings: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
        """The names of the weights that a base's tensors are, and whether that is one matrix, quantized."""
        main = next(self._tensors[endings[ending]]() for ending in WEIGHTS if ending in endings)
        if (main.is_floating_point() and main.itemsize > 1) or endings == {"weight": base}:
            yield from ((name, False) for name in endings.values())
        else:
            yield f"{base}.weight", True

    def _quantized(self, base: str, parameter: Tensor) -> Part | Tensor:
        if parameter.dim() != 2:
            raise CheckpointError(
                f"{base} is quantized, but its config.json makes it {list(parameter.shape)}, no matrix"
            )
        rows, columns = parameter.shape
        matrix = read_matrix(base, self._read(base), (rows, columns), self._quantization)
        return matrix.raw if isinstance(matrix.raw, Tensor) else Part(matrix.raw, None, matrix.columns)

    def _floats(self, base: str, target: str) -> Tensor:
        """A quantized matrix of which Transformers makes another parameter with others.

        Raises:
            ModelError: its tensors do not say its size.
        """
        tensors = self._read(base)
        weight, stated = next(tensors[ending] for ending in WEIGHTS if ending in tensors), tensors.get("weight_shape")
        shape = weight.shape if stated is None else tuple(stated.tolist())
        if len(shape) != 2 or (stated is None and weight.dtype not in (torch.float8_e4m3fn, torch.int8)):
            raise ModelError(
                f"{base} is quantized in a layout that does not say its size, and Transformers makes {target} of it "
                "and others; use a checkpoint in FP8 or an unquantized one"
            )
        matrix = read_matrix(base, tensors, (int(shape[0]), int(shape[1])), self._quantization)
        return floats_of(Part(matrix.raw, None, matrix.columns))

    def _bias(self, piece: Piece, size: int) -> Tensor:
        tensor = self._tensors[self._groups[piece.name]["weight"]]()
        tensor = tensor if piece.index is None else tensor[piece.index]
        if tuple(tensor.shape) != (size,):
            raise CheckpointError(f"{piece.name} is {list(tensor.shape)} an expert, where the model needs [{size}]")
        return tensor if piece.rows is None else tensor[row_index(piece.rows)]

    def _read(self, base: str) -> dict[str, Tensor]:
        return {ending: self._tensors[name]() for ending, name in self._groups[base].items()}


def group_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Tensors' names by the matrix that they belong to: base -> {ending: name}; what is no matrix's stands alone.

    Raises:
        ModelError: a tensor is of a method that is refused.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        base, ending = split_name(name)
        groups.setdefault(base, {})[ending] = name
    alone = [base for base, endings in groups.items() if not endings.keys() & set(WEIGHTS)]
    for base in alone:  # parameters that only sound like scales
        groups |= {name: {"weight": name} for name in groups.pop(base).values()}
    return groups


def _one(name: str, tensor: Tensor, index: int, experts: int) -> Tensor:
    """One expert's of a stacked tensor; what holds one number is every expert's.

    Raises:
        CheckpointError: it stacks another number of experts.
    """
    if tensor.numel() == 1:
        return tensor
    if tensor.shape[0] != experts:
        raise CheckpointError(f"{name} stacks {tensor.shape[0]} experts, but the config.json has {experts}")
    return tensor[index]


def _fitting(name: str, value: Tensor | Part, state: Mapping[str, Tensor]) -> Tensor | Part:
    """The value, if it is as large as the model's parameter; quantized ones were checked before.

    Raises:
        CheckpointError: it is not.
    """
    if isinstance(value, Tensor) and value.shape != state[name].shape:
        raise CheckpointError(
            f"{name} is {list(value.shape)} in the checkpoint, but its config.json makes it {list(state[name].shape)}; "
            "they do not belong together"
        )
    return value
