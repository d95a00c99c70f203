"""GGUF files: which tensor is which of a model's weights, and what llama.cpp's converter did to it undone.

Names follow from the `gguf` package's own tables, inverted: each parameter of the model is looked up as the converter
would have. What the converter changes beside names:
    llama, granitemoe   rows of q and k are permuted within a head for another order of rotary pairs
    deepseek2           kv_b is split into k_b (transposed) and v_b in newer files; joined again in float32
    granitemoe          a shared expert's gate and up are two tensors; joined again
    qwen2moe            the shared expert's gate loses its dimension of 1
NVFP4 has the scale of a whole matrix in a tensor NAME.scale, for stacked experts [E]; without one it is 1.
Experts are stacked, [E, R, K], gate, up and down apart or gate and up in one.

Legend: E experts, R rows, K columns, H heads, N and V width of a head of keys and of values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.families import FamilyLayout, expert_modules
from ...errors import CheckpointError, first_line
from ...memory.formats.raw import RawMatrix
from ...planning.budget import format_bytes
from ..checkpoint import read_config
from ..gguf_header import TRANSCODED
from ..gguf_values import architecture_of
from ..quantization import Quantization
from .base import ExpertWeights, Part, row_index, tokenizer_from
from .gguf_config import config_of, tokenizer_of
from .gguf_file import GgufFile, gguf_package, read_gguf, split_files
from .gguf_types import floats_of, int8_bytes, stored_matrix

logger = logging.getLogger("moestro")
_PERMUTED = ("llama", "granitemoe")  # architectures whose converter permutes q and k
_RENAMED = {  # parameters that Transformers has renamed since the package's tables were written
    "block_sparse_moe.router": "block_sparse_moe.router.layer",
}


class GgufSource:
    """One GGUF file, or the parts of one.

    Args:
        files: the file, or the files of its folder.
        config, tokenizer: a folder or hub id to take the config or the tokenizer from instead.
        transcode: round types that no format here keeps to int8.
    """

    method: str | None = None

    def __init__(
        self,
        files: Sequence[Path],
        *,
        config: str | None = None,
        tokenizer: str | None = None,
        transcode: bool = False,
    ) -> None:
        self._transcode = transcode
        self._config_from, self._tokenizer_from = config, tokenizer
        self._first = split_files(files)[0]
        self.file = read_gguf(files)
        self.architecture = architecture_of(self.file)

    def config(self) -> Any:
        if self._config_from is None:
            return config_of(self.file)
        config = read_config(self._config_from, self._config_from, quantized=True)
        Quantization.taken_off(self._config_from, config)
        return config

    def tokenizer(self) -> Any:
        if self._tokenizer_from is not None:
            return tokenizer_from(self._tokenizer_from)
        return tokenizer_of(self._first, self.file)

    def weights(self, model: Any) -> GgufWeights:
        return GgufWeights(model, self.file, self.architecture, self._transcode)


class GgufWeights:
    """The weights of a GGUF file, under a model's names."""

    def __init__(self, model: Any, file: GgufFile, architecture: str, transcode: bool = False) -> None:
        self._transcode = transcode
        self._model, self._tensors, self._architecture = model, file.tensors, architecture
        self._layouts = {name: FamilyLayout.of(name, module) for name, module in expert_modules(model).items()}
        gguf = gguf_package()
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = gguf.get_tensor_name_map(kind, model.config.get_text_config().num_hidden_layers)
        for name, layout in self._layouts.items():
            for part in layout.shape.parts:
                self._find(_layer(name), part, 0)
        if transcode:
            self._say_sizes()

    def expert(self, module: str, expert: int) -> ExpertWeights:
        layout = self._layouts[module]
        weights = ExpertWeights()
        for part, shape in layout.shape.parts.items():
            name, joined = self._find(_layer(module), part, expert)
            tensor = self._tensors[name]
            is_stack = "_exps." in name
            rows = (shape[0] * (2 if joined else 1), *shape[1:])
            if tensor.shape != ((layout.experts, *rows) if is_stack else rows):
                needs = [layout.experts, *rows] if is_stack else list(rows)
                raise CheckpointError(f"{name} is {list(tensor.shape)}, where the file's metadata needs {needs}")
            data = tensor.data[expert] if is_stack else tensor.data
            start = shape[0] if joined and part.startswith("up") else 0
            index = row_index(range(start, start + shape[0])) if joined else None
            if part.endswith("_bias"):
                weights.biases[part] = data if index is None else data[index]
            elif tensor.type in TRANSCODED:
                weights.matrices[part] = Part(self._stored(name, data if index is None else data[index], expert))
            else:
                weights.matrices[part] = Part(self._stored(name, data, expert), index)
        return weights

    def dense(self) -> Iterator[tuple[str, Tensor | Part]]:
        state: dict[str, Tensor] = self._model.state_dict()
        tied = set(getattr(self._model, "all_tied_weights_keys", None) or {})
        experts = tuple(f"{module}." for module in self._layouts)
        for name, parameter in state.items():
            if name.startswith(experts):
                continue
            try:
                found = self._dense(name)
            except (IndexError, RuntimeError) as error:
                raise CheckpointError(
                    f"the tensors of {name} do not fit together or not to the file's metadata ({first_line(error)})"
                ) from error
            if found is None:
                if name in tied:
                    continue
                raise CheckpointError(f"the file has no {self._name_of(name)}, the model's {name}; it is incomplete")
            if isinstance(found, Tensor) and found.numel() == parameter.numel():
                found = found.view(parameter.shape)
            shape = tuple(found.shape) if isinstance(found, Tensor) else _shape(found)
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self._name_of(name)} is {list(shape)}, but the file's metadata makes it {list(parameter.shape)}"
                )
            yield name, found

    def _dense(self, name: str) -> Tensor | Part | None:
        stored = self._name_of(name)
        if stored in self._tensors:
            tensor = self._tensors[stored]
            raw = self._stored(stored, tensor.data)
            heads = self._heads(stored)
            if heads is None:
                return raw if isinstance(raw, Tensor) else Part(raw)
            order = torch.arange(tensor.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()
            return raw[order] if isinstance(raw, Tensor) else Part(raw, order)
        layer = re.search(r"layers\.(\d+)\.", name)
        at = f"blk.{layer[1]}." if layer else ""
        if name.endswith("kv_b_proj.weight"):
            return self._joined_kv(f"{at}attn_k_b.weight", f"{at}attn_v_b.weight")
        if name.endswith("shared_mlp.input_linear.weight"):
            parts = [f"{at}ffn_gate_shexp.weight", f"{at}ffn_up_shexp.weight"]
            return torch.cat([self._floats(part) for part in parts]) if parts[0] in self._tensors else None
        return None

    def _joined_kv(self, keys: str, values: str) -> Tensor | None:
        """k_b [H, K, N] and v_b [H, V, K] -> float32 [H * (N + V), K], as DeepSeek's kv_b is."""
        if keys not in self._tensors or values not in self._tensors:
            return None
        k, v = self._floats(keys), self._floats(values)  # [H * K, N], [H * V, K]
        heads = self._tensors[keys].shape[0]
        return torch.cat((k.view(heads, -1, k.shape[1]).transpose(1, 2), v.view(heads, -1, v.shape[1])), 1).flatten(
            0, 1
        )

    def _floats(self, name: str) -> Tensor:
        """A tensor of any form as float32 [rows, K]."""
        tensor = self._tensors[name]
        data = tensor.data.flatten(0, -2)
        raw = self._stored(name, data)  # refuses types that are not read
        if isinstance(raw, Tensor):
            return raw.float()
        return floats_of(data, tensor.type) * raw.tensors.get("tensor", 1)

    def _stored(self, name: str, data: Tensor, expert: int = 0) -> RawMatrix | Tensor:
        """A matrix from the bytes of a tensor or of one of its experts, with its scale where it has one.

        Raises:
            CheckpointError: the scales are of another shape. ModelError: nothing here reads the tensor's type.
        """
        tensor, scale = self._tensors[name], None
        beside = self._tensors.get(f"{name.removesuffix('.weight')}.scale")
        if beside is not None:
            wanted = tensor.shape[0] if len(tensor.shape) == 3 and "_exps." in name else 1
            if beside.data.dtype != torch.float32 or beside.data.numel() not in (1, wanted):
                raise CheckpointError(
                    f"{name} has scales of {list(beside.shape)} in {beside.type}, where it needs {wanted} in F32"
                )
            scale = float(beside.data.flatten()[min(expert, beside.data.numel() - 1)])
        return stored_matrix(name, tensor, data, scale=scale, transcode=self._transcode)

    def _say_sizes(self) -> None:
        """Log what becomes of the tensors that are transcoded."""
        found = [tensor for tensor in self._tensors.values() if tensor.type in TRANSCODED]
        if found:
            now, then = sum(tensor.data.nbytes for tensor in found), sum(map(int8_bytes, found))
            logger.warning(
                "%s: %s become %s in int8",
                ", ".join(sorted({tensor.type for tensor in found})),
                format_bytes(now),
                format_bytes(then),
            )

    def _heads(self, stored: str) -> int | None:
        """How many heads a tensor's rows are permuted within; None where they are not."""
        config = self._model.config.get_text_config()
        if self._architecture not in _PERMUTED:
            return None
        kinds = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        return kinds.get(stored.split(".")[-2])

    def _name_of(self, name: str) -> str:
        """The tensor that a parameter is written as."""
        base, _, ending = name.rpartition(".")
        if ending not in ("weight", "bias"):
            base, ending = (name[: -len("_bias")], "bias") if name.endswith("_bias") else (name, "weight")
        for ours, theirs in _RENAMED.items():
            base = f"{base.removesuffix(ours)}{theirs}" if base.endswith(ours) else base
        found = self._names.get_name(base)
        return f"{base if found is None else found}.{ending}"

    def _find(self, layer: str, part: str, expert: int) -> tuple[str, bool]:
        """The tensor that holds a part of an expert, and whether gate and up share it.

        Raises:
            CheckpointError: the file has none.
        """
        matrix, _, bias = part.partition("_")
        ending = bias or "weight"
        names = [f"blk.{layer}.ffn_{matrix}_exps.{ending}", f"blk.{layer}.ffn_{matrix}.{expert}.{ending}"]
        found = next((name for name in names if name in self._tensors), None)
        joined = f"blk.{layer}.ffn_gate_up_exps.{ending}"
        if found is None and matrix != "down" and joined in self._tensors:
            return joined, True
        if found is None:
            raise CheckpointError(f"the file has no {names[0]}; it is incomplete: download it again")
        return found, False


def _layer(module: str) -> str:
    found = re.search(r"layers\.(\d+)\.", module)
    assert found is not None
    return found[1]


def _shape(part: Part) -> tuple[int, ...]:
    if isinstance(part.raw, Tensor):
        return tuple(part.raw.shape)
    return (part.raw.rows, part.raw.columns)
