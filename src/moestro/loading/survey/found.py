"""The weights of a model as a survey finds them: sizes and formats, no bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...planning.expert_sizes import ExpertShape
from ...planning.model_config import experts_of, text_of

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer.

    format: the name of the one that a checkpoint keeps them in; None of plain floats. post_norm: a norm follows each.
    """

    experts: int
    shape: ExpertShape
    format: str | None = None
    post_norm: bool = False


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A tensor outside the experts.

    size: rows and columns of a matrix that is packed on a CPU; None of one that stays in torch. item_bytes: of one
    number that has a dtype of its own; 0 of the model's dtype. format: as in `ExpertLayer`. is_head: the output head or
    the embedding. is_embedding: looked up, not multiplied.
    """

    name: str
    count: int
    size: tuple[int, int] | None = None
    item_bytes: int = 0
    format: str | None = None
    is_head: bool = False
    is_embedding: bool = False


@dataclass(frozen=True)
class Survey:
    """All that is known of a model before a weight is read.

    kind: "safetensors", "GGUF", "packed" or "shape". config: its config.json with its family's defaults. dtype: that
    the model would have, as torch names it. stored: whether its weights keep the form that its files have them in.
    weights_bytes, fetched_bytes: of its files of weights, and of those that are not on this machine yet.
    """

    model: str
    kind: str
    config: Mapping[str, Any]
    dtype: str
    layers: tuple[ExpertLayer, ...]
    dense: tuple[DenseWeight, ...]
    stored: bool = False
    method: str = ""
    weights_bytes: int = 0
    fetched_bytes: int = 0

    @property
    def text(self) -> Mapping[str, Any]:
        """What its config says of the text model."""
        return text_of(self.config)

    @property
    def top_k(self) -> int:
        """To how many experts of a layer each token is sent."""
        return experts_of(self.text)[1] or 1
