"""What a kind of checkpoint says: which matrix each expert has, as the file holds it, and the other weights.

Nothing here computes with weights, copies them or knows where they go.

Legend: R rows (output features), K columns (input features), D model width, F expert neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ...errors import CheckpointError, first_line
from ...memory.formats.codes import values
from ...memory.formats.raw import RawMatrix, read_raw, read_strided
from ...memory.formats.strided import in_own_order
from ...memory.formats.strided import values as strided_values
from ...planning.spelling import spelled
from ..checkpoint import refuse_code


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of an expert, or a quantized one of another layer.

    raw: the stored matrix, of which this may be some of the rows; a float tensor where it is not quantized.
    rows: int64, which rows of `raw` this matrix has, in the order in which they are packed; None for all.
    columns: int64 [K], the order in which columns are packed; None for the file's own. Of gate and up the activations
        are gathered by it once for each distinct order (GPTQ's act-order); of down it is the order of the neurons,
        which the rows of gate and up follow, so nothing is gathered.
    """

    raw: RawMatrix | Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(slots=True)
class ExpertWeights:
    """One expert: its matrices "gate", "up" and "down", and its biases, named as in `ExpertShape.parts`."""

    matrices: dict[str, Part] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


class Weights(Protocol):
    """The weights of a checkpoint, under the names of a model."""

    def expert(self, module: str, expert: int) -> ExpertWeights:
        """One expert of the experts module of that name.

        Raises:
            CheckpointError: shapes do not belong to the model. ModelError: a layout that is not known.
        """

    def dense(self) -> Iterator[tuple[str, Tensor | Part]]:
        """Each weight that is no expert's, by the model's name for it; quantized matrices as they are stored.

        Raises:
            CheckpointError: after the last, if one is missing; or shapes do not belong to the model.
        """


class Source(Protocol):
    """A checkpoint of one kind."""

    @property
    def method(self) -> str | None:
        """How its config.json says that it is quantized; None where there is no such file or it says nothing."""

    def config(self) -> Any:
        """The Transformers config, without what it says of quantization.

        Raises:
            ModelError: there is none that Transformers can use.
        """

    def tokenizer(self) -> Any:
        """The Transformers tokenizer.

        Raises:
            CheckpointError: there is none that Transformers can read.
        """

    def weights(self, model: Any) -> Weights:
        """The weights for a model of this checkpoint's config, whose own may be on the meta device.

        Raises:
            CheckpointError: an expert is not there.
        """


def floats_of(value: Tensor | Part) -> Tensor:
    """A weight as floats, those of a quantized matrix as float32 [R, K]; a copy, so that the file may go."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value.raw, Tensor):
        return value.raw.clone()
    if value.raw.fmt.is_strided:
        fmt = value.raw.fmt
        return in_own_order(fmt, strided_values(fmt, read_strided(value.raw)))
    dense = values(value.raw.fmt, read_raw(value.raw, value.rows, value.columns))
    if value.columns is None:
        return dense
    return torch.empty_like(dense).index_copy_(1, value.columns, dense)


@functools.lru_cache
def row_index(rows: range) -> Tensor:
    """int64, the rows of a range; equal ranges give one tensor."""
    return torch.arange(rows.start, rows.stop, rows.step)


def tokenizer_from(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        CheckpointError: it has none. ModelError: it needs code that is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise all kinds
        refuse_code(source, error)
        raise CheckpointError(
            f"{source} has no tokenizer that Transformers can read ({first_line(error)}); name a checkpoint with the "
            f"same one by {spelled('tokenizer', 'ORG/REPO')}"
        ) from error


def ordered(weights: ExpertWeights) -> ExpertWeights:
    """Have the rows of gate and up, and their biases, follow the order of down's columns."""
    order = weights.matrices["down"].columns
    if order is None:
        return weights
    for part in ("gate", "up"):
        if part in weights.matrices:
            one = weights.matrices[part]
            rows = order if one.rows is None else one.rows[order]
            weights.matrices[part] = Part(one.raw, rows, one.columns)
        if f"{part}_bias" in weights.biases:
            weights.biases[f"{part}_bias"] = weights.biases[f"{part}_bias"][order]
    return weights
