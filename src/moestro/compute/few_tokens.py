"""What a step of few tokens meets in a decoder layer, in as few calls as there are steps.

In plain torch these are some forty small operations a layer, which cost more than the kernels wait for memory. Their
twin is Transformers' own code; `decode/cpu/` puts these in its place where they compute the same.

All sizes are checked by the kernels' bindings: a constructor raises ValueError for parts that do not fit each other, a
method for a tensor that does not fit the parts. Their objects keep the tensors that they read alive.

Tokens are of one or several sequences, as many of each, those of a sequence next to each other. `seen` says what each
token sees of its sequence's cache: int64 [T, 2], first and behind the last, which is the token itself; None for all.

Legend: T tokens of the step, B sequences, D model width, H query heads, G key heads, d their width, S tokens in the
cache, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import KernelShape, Matrix, _kernels, runner, type_of


class Norm(NamedTuple):
    """A norm as `cpu.rms_norm` takes it: weight (read at each use), offset, epsilon."""

    weight: Tensor
    offset: float
    epsilon: float

    def as_norm(self) -> _kernels.Norm:
        """As the kernels take it."""
        return _kernels.Norm(*self)


class StepAttention:
    """What stands before and behind the cache when tokens go through an attention layer.

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
        self.runner, self.level = runner(threads), level
        q, k, v = (matrix.linear for matrix in projections)
        q_norm, k_norm = (None if norm is None else norm.as_norm() for norm in norms)
        self.kernel = _kernels.Attention(q, k, v, q_norm, k_norm, head, type_of(dtype), scaling)

    def project(self, x: Tensor, cosine: Tensor, sine: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Fill q [T, H * d], k and v [T, G * d] from x [T, D]; cosine and sine are [T, d], all of one dtype."""
        cosine, sine, x = cosine.contiguous(), sine.contiguous(), x.contiguous()
        self.kernel.project(self.runner, self.level, x, cosine, sine, q, k, v)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        """softmax(q K^T * scaling) V: query [T, H * d], keys and values [B, G, S, d] -> [T, H * d].

        Each head of the cache is one piece; heads and sequences may be any distance apart.
        """
        out = torch.empty_like(query)
        self.kernel.attend(self.runner, self.level, query, keys, values, seen, out)
        return out


class StepFirstHalf:
    """The first half of a decoder layer: hidden = x + attention(norm(x)), then the norm before the experts.

    Args:
        output: the attention's output projection. before, after: the norms before and behind the attention.
    """

    def __init__(self, attention: StepAttention, output: Matrix, before: Norm, after: Norm) -> None:
        self.runner, self.level = attention.runner, attention.level
        self.kernel = _kernels.FirstHalf(attention.kernel, output.linear, before.as_norm(), after.as_norm())

    def run(
        self, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens x [.., D] -> hidden and its norm, of the shape and dtype of x.

        Args:
            cosine, sine: [.., d], of the dtype of x, as are keys and values.
            keys, values: [B, G, S, d]; the tokens' own are written by this, where `seen` ends.
        """
        x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
        hidden, normed = torch.empty_like(x), torch.empty_like(x)
        self.kernel.run(self.runner, self.level, x, cosine, sine, keys, values, seen, hidden, normed)
        return hidden, normed


class StepRouter:
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
        self.kernel = _kernels.Router(self._weight, top_k, normalized, type_of(score_dtype))

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [.., D], in the weight's dtype -> logits [T, E], scores [T, K], int64 index [T, K]."""
        x = x.contiguous()
        tokens = x.numel() // self.width
        logits = torch.empty((tokens, self._weight.shape[0]), dtype=x.dtype)
        scores = torch.empty((tokens, self._top_k), dtype=self._score_dtype)
        index = torch.empty((tokens, self._top_k), dtype=torch.int64)
        self.kernel.run(self._runner, self._level, x, logits, scores, index)
        return logits, scores, index


class StepLayer:
    """A whole decoder layer: its first half, its router, and experts that are all in RAM; run by `StepLayers`.

    Args:
        shape: of the experts, as `CpuExperts.kernel_shape` has it. experts: uint8, the packed bytes of each.
    """

    def __init__(self, first: StepFirstHalf, router: StepRouter, shape: KernelShape, experts: Sequence[Tensor]) -> None:
        self.runner, self.level = first.runner, first.level
        self.kernel = _kernels.DecoderLayer(first.kernel, router.kernel, shape, tuple(experts))


class StepLayers:
    """Decoder layers that follow one another, of one width and dtype, in one call."""

    def __init__(self, layers: Sequence[StepLayer]) -> None:
        self._runner, self._level = layers[0].runner, layers[0].level
        self._kernel = _kernels.DecoderLayers([layer.kernel for layer in layers])

    def run(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        seen: Tensor | None = None,
    ) -> tuple[Tensor, int, int]:
        """Tokens x [.., D] -> the last layer's output, of their shape and dtype.

        Args:
            cosine, sine: [.., d]. caches: keys and values [B, G, S, d] of each layer, as `StepFirstHalf.run`'s.

        Returns:
            Beside the output, how many experts computed in all layers, and for how many tokens, each counted once for
            each of its experts.
        """
        x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
        hidden = torch.empty_like(x)
        experts, tokens = self._kernel.run(self._runner, self._level, x, cosine, sine, caches, seen, hidden)
        return hidden, experts, tokens
