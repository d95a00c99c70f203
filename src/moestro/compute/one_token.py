"""What one token meets in a decoder layer besides its experts, in as few calls as there are steps.

In plain torch these are some forty small operations a layer, which cost more than the kernels wait for memory. Their
twin is Transformers' own code; `fuse/` puts these in its place where they compute the same.

Legend: D model width, H query heads, G key heads, d their width, S tokens in the cache, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory.formats import FLOAT_FORMATS
from .cpu import KERNEL_FORMATS, KernelShape, Matrix, _kernels, runner


class Norm(NamedTuple):
    """A norm as `cpu.rms_norm` takes it: float32 weight, offset, epsilon."""

    weight: Tensor
    offset: float
    epsilon: float

    def as_norm(self) -> _kernels.Norm:
        """As the kernels take it."""
        return _kernels.Norm(self.weight.data_ptr(), self.offset, self.epsilon)


class OneTokenAttention:
    """What stands before and behind the cache when one token goes through an attention layer.

    Args:
        projections: q, k and v. norms: q's and k's, over a head or over all of them, or None.
        head: width of a head, a multiple of 16.
        level: as in `CpuExperts`.
    """

    def __init__(
        self,
        projections: tuple[Matrix, Matrix, Matrix],
        norms: tuple[Norm | None, Norm | None],
        *,
        head: int,
        scaling: float,
        dtype: torch.dtype,
        threads: int,
        level: str = "",
    ) -> None:
        self._kept = (projections, norms)  # the kernels see addresses only
        self.runner, self.level = runner(threads), level
        self.kernel = _kernels.Attention()
        self.kernel.q, self.kernel.k, self.kernel.v = (matrix.as_linear() for matrix in projections)
        self.kernel.head, self.kernel.scaling = head, scaling
        self.kernel.type = KERNEL_FORMATS[FLOAT_FORMATS[dtype]]
        sizes = [(n.weight.data_ptr(), n.weight.numel(), n.offset, n.epsilon) if n else (0, 1, 0.0, 0.0) for n in norms]
        self.kernel.set_norms(*sizes[0], *sizes[1])

    def project(self, x: Tensor, cosine: Tensor, sine: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Fill q [H * d], k and v [G * d] from x [D]; cosine and sine are [d], all of one dtype."""
        cosine, sine, x = cosine.contiguous(), sine.contiguous(), x.contiguous()
        self.kernel.project(
            self.runner,
            self.level,
            x.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            cosine.numel(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
        )

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """softmax(q K^T * scaling) V: query [H * d], keys and values [1, G, S, d] -> [H * d].

        Each head of the cache is one piece; heads may be any distance apart.
        """
        out = torch.empty_like(query)
        self.kernel.attend(
            self.runner,
            self.level,
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[-2],
            keys.stride(1),
            out.data_ptr(),
        )
        return out


class OneTokenFirstHalf:
    """The first half of a decoder layer: hidden = x + attention(norm(x)), then the norm before the experts.

    Args:
        output: the attention's output projection. before, after: the norms before and behind the attention.
    """

    def __init__(self, attention: OneTokenAttention, output: Matrix, before: Norm, after: Norm) -> None:
        self._kept = (attention, output, before, after)
        self.runner, self.level = attention.runner, attention.level
        self.kernel = _kernels.FirstHalf()
        self.kernel.attention, self.kernel.output = attention.kernel, output.as_linear()
        self.kernel.before, self.kernel.after = before.as_norm(), after.as_norm()

    def run(self, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token x [.., D] -> hidden and its norm, of the shape and dtype of x.

        Args:
            cosine, sine: [.., d], of the dtype of x, as are keys and values.
            keys, values: [1, G, S, d]; the token's own, the last of S, are written by this.
        """
        x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
        hidden, normed = torch.empty_like(x), torch.empty_like(x)
        self.kernel.run(
            self.runner,
            self.level,
            x.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            cosine.numel(),
            _place(keys, values),
            hidden.data_ptr(),
            normed.data_ptr(),
        )
        return hidden, normed


class OneTokenRouter:
    """softmax(x W^T) and the best K of it; with `normalized`, their scores sum to 1.

    Args:
        weight: [E, D], float32, float16 or bfloat16, which the logits have too. score_dtype: of the scores.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        top_k: int,
        normalized: bool,
        score_dtype: torch.dtype,
        threads: int,
        level: str = "",
    ) -> None:
        self._weight, self._top_k, self._score_dtype = weight.detach().contiguous(), top_k, score_dtype
        self.width, self.dtype = weight.shape[1], weight.dtype
        self._runner, self._level = runner(threads), level
        names = [KERNEL_FORMATS[FLOAT_FORMATS[dtype]] for dtype in (weight.dtype, score_dtype)]
        self.kernel = _kernels.Router(
            self._weight.data_ptr(), names[0], weight.shape[0], weight.shape[1], top_k, normalized, names[1]
        )

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [.., D] of one token, in the weight's dtype -> logits [1, E], scores [1, K], int64 index [1, K]."""
        x = x.contiguous()
        logits = torch.empty((1, self._weight.shape[0]), dtype=x.dtype)
        scores = torch.empty((1, self._top_k), dtype=self._score_dtype)
        index = torch.empty((1, self._top_k), dtype=torch.int64)
        self.kernel.run(self._runner, self._level, x.data_ptr(), logits.data_ptr(), scores.data_ptr(), index.data_ptr())
        return logits, scores, index


class OneTokenLayer:
    """A whole decoder layer: its first half, its router, and experts that are all in RAM; run by `OneTokenLayers`.

    Args:
        shape: of the experts, as `CpuExperts.kernel_shape` has it. experts: uint8, the packed bytes of each.
    """

    def __init__(
        self, first: OneTokenFirstHalf, router: OneTokenRouter, shape: KernelShape, experts: Sequence[Tensor]
    ) -> None:
        self._kept = (first, router, experts)
        self.runner, self.level = first.runner, first.level
        self.kernel = _kernels.DecoderLayer(first.kernel, router.kernel, shape, [e.data_ptr() for e in experts])


class OneTokenLayers:
    """Decoder layers that follow one another, of one width and dtype, in one call."""

    def __init__(self, layers: Sequence[OneTokenLayer]) -> None:
        self._kept = layers
        self._runner, self._level = layers[0].runner, layers[0].level
        self._kernel = _kernels.DecoderLayers([layer.kernel for layer in layers])

    def run(
        self, x: Tensor, cosine: Tensor, sine: Tensor, caches: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, int]:
        """One token x [.., D] -> the last layer's output, of its shape and dtype, and how many experts computed.

        Args:
            cosine, sine: [.., d]. caches: keys and values [1, G, S, d] of each layer, as `OneTokenFirstHalf.run`'s.
        """
        x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
        hidden = torch.empty_like(x)
        experts = self._kernel.run(
            self._runner,
            self._level,
            x.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            cosine.numel(),
            [_place(keys, values) for keys, values in caches],
            hidden.data_ptr(),
        )
        return hidden, experts


def _place(keys: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    """One layer's cache, [1, G, S, d] each, as the kernels take it."""
    return keys.data_ptr(), values.data_ptr(), keys.shape[2], keys.stride(1)
