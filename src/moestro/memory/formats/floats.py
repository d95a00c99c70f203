"""fp32, fp16 and bf16: the weights as they are, in blocks of neurons."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import ALIGN_BYTES, BLOCK, ExpertShape, UnpackedExpert

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BIAS_BYTES = 4


class FloatFormat:
    """One float dtype for all weights; biases are float32, so that no dtype of bias loses a bit."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = _DTYPES[name]

    def expert_bytes(self, shape: ExpertShape) -> int:
        used = shape.blocks * self._block_bytes(shape) + (shape.hidden * _BIAS_BYTES if shape.has_bias else 0)
        return -(-used // ALIGN_BYTES) * ALIGN_BYTES

    def byte_range(self, shape: ExpertShape, neurons: range) -> range:
        block_bytes = self._block_bytes(shape)
        last = neurons.stop >= shape.neurons
        stop = self.expert_bytes(shape) if last else neurons.stop // BLOCK * block_bytes
        return range(neurons.start // BLOCK * block_bytes, stop)

    def pack(self, packed: Tensor, shape: ExpertShape, parts: Mapping[str, Tensor]) -> None:
        views = self._views(packed, shape)
        for name, tensor in parts.items():
            if name == "down_bias":
                views[name].copy_(tensor)
                continue
            blocked = tensor.movedim(1, 0) if name == "down" else tensor  # neurons first: [F, ...]
            full = shape.neurons // BLOCK
            view = views[name]  # [N, B, D] | [N, D, B] for down | [N, B] for biases
            target = view.transpose(1, 2) if name == "down" else view  # [N, B, ...]
            target[:full].copy_(blocked[: full * BLOCK].unflatten(0, (full, BLOCK)))
            if rest := shape.neurons % BLOCK:
                target[full, :rest].copy_(blocked[full * BLOCK :])
                target[full, rest:].zero_()

    def unpack(self, packed: Tensor, shape: ExpertShape, neurons: range, dtype: torch.dtype) -> UnpackedExpert:
        blocks = slice(neurons.start // BLOCK, -(-neurons.stop // BLOCK))
        count = len(neurons)

        def rows(name: str) -> Tensor | None:
            view = views.get(name)
            return None if view is None else view[blocks].to(dtype).flatten(0, 1)[:count]  # [f, D] | [f]

        views = self._views(packed, shape)
        up = rows("up")
        assert up is not None
        with_last = shape.has_bias and neurons.stop == shape.neurons
        return UnpackedExpert(
            up=up,
            down=views["down"][blocks].to(dtype).permute(1, 0, 2).flatten(1)[:, :count],  # [D, f]
            gate=rows("gate"),
            up_bias=rows("up_bias"),
            gate_bias=rows("gate_bias"),
            down_bias=views["down_bias"].to(dtype) if with_last else None,
        )

    def _block_bytes(self, shape: ExpertShape) -> int:
        matrices, biases = (3, 2) if shape.has_gate else (2, 1)
        weight_bytes = matrices * BLOCK * shape.hidden * self.dtype.itemsize
        return weight_bytes + (biases * BLOCK * _BIAS_BYTES if shape.has_bias else 0)

    def _views(self, packed: Tensor, shape: ExpertShape) -> dict[str, Tensor]:
        """Strided views of the parts: weights [N, B, D] (down [N, D, B]), biases [N, B], down bias [D]."""
        n, d, block_bytes = shape.blocks, shape.hidden, self._block_bytes(shape)
        blocks = packed[: n * block_bytes].view(n, block_bytes)
        matrices = (["gate"] if shape.has_gate else []) + ["up", "down"]
        size = BLOCK * d * self.dtype.itemsize
        views = {
            name: blocks[:, i * size : (i + 1) * size]
            .view(self.dtype)
            .unflatten(1, (d, BLOCK) if name == "down" else (BLOCK, d))
            for i, name in enumerate(matrices)
        }
        if shape.has_bias:
            start, size = len(matrices) * size, BLOCK * _BIAS_BYTES
            for i, name in enumerate((["gate_bias"] if shape.has_gate else []) + ["up_bias"]):
                views[name] = blocks[:, start + i * size : start + (i + 1) * size].view(torch.float32)
            end = n * block_bytes
            views["down_bias"] = packed[end : end + d * _BIAS_BYTES].view(torch.float32)
        return views
