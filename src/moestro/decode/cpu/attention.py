"""One token's attention in two calls instead of some thirty operations: swapped in where it computes the same.

Before the cache: the three projections in one go, norms and the rotary embedding. Behind it: the query against
all keys and values. The cache stays Transformers' own, and so does every step that is not one token of one
sequence without a mask. Which layers are plain enough is found by trying them on numbers.

Legend: D model width, H query heads, G key heads, d their width, S tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...compute.eager import outside_of_graphs
from ...compute.one_token import OneTokenAttention
from ..dense import PackedLinear
from ..hooks import Fused, has_hooks, put_in_place
from .cache import CacheKind, append, is_plain
from .norm import norm_of

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_ARGUMENTS = frozenset(("hidden_states", "position_embeddings", "attention_mask", "past_key_values"))
_ANY = object()  # a tensor of positions, whatever they are
# What decoders pass on to their attention layers besides, and these to functions that ignore it.
_PASSED_ON: Mapping[str, Any] = {
    "position_ids": _ANY,
    "cache_position": _ANY,
    "use_cache": True,
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
_PAST = 6  # tokens in the cache of a trial
_LARGEST_SCORE = 25.0  # of the second trial: far enough for a soft cap to show
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def fuse_attention(module: nn.Module, threads: int) -> bool:
    """Give an attention layer a forward for single tokens, if it is one that we know; says whether it is."""
    if not _looks_known(module):
        return False
    try:
        fused = FusedAttention(module, threads)
    except ValueError:  # its parts do not fit each other: queries with gates between them, for instance
        return False
    if not fused.agrees():
        return False
    put_in_place(module, fused, *module.modules())
    return True


class FusedAttention(Fused):
    """The forward of a recognized attention layer; ValueError if its parts do not fit each other."""

    def __init__(self, module: Any, threads: int) -> None:
        super().__init__(module)
        self.layer, self.output = module.layer_idx, module.o_proj
        fused_norms = [norm_of(getattr(module, name, None)) for name in _NORMS]
        q_norm, k_norm = (None if fused is None else fused.norm for fused in fused_norms)
        self.parts = [module.get_submodule(name) for name in (*_PROJECTIONS, *_NORMS) if hasattr(module, name)]
        # By this name the module finds what computes its scores; another may be registered under it.
        self._implementation = module.config._attn_implementation
        self._function = ALL_ATTENTION_FUNCTIONS.get(self._implementation)
        self._tried: Mapping[str, Any] = {}  # what else it may be given, see `agrees`
        q, k, v = (getattr(module, name) for name in _PROJECTIONS[:3])
        self.dtype, self.head = module.o_proj.weight_dtype, module.head_dim
        self.width, self._scaling = q.in_features, module.scaling
        self._sizes = (q.out_features, k.out_features, v.out_features)
        self.cache_kind = CacheKind(self.dtype, k.out_features // self.head, self.head)
        self.kernel = OneTokenAttention(
            (q.matrix, k.matrix, v.matrix),
            (q_norm, k_norm),
            head=module.head_dim,
            scaling=module.scaling,
            dtype=self.dtype,
            threads=threads,
        )
        if self.output.in_features != q.out_features:
            raise ValueError("the output projection does not take what the heads give")

    @outside_of_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs.get("hidden_states")
        if args or x is None or not self.fits(x, kwargs):
            return self._original(*args, **kwargs)
        return self._run(x, kwargs["position_embeddings"], kwargs["past_key_values"]), None

    def fits(self, x: Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the layer is what it was, has no hooks inside, and is given what it was tried with.

        That is one token of one sequence without a mask, and a plain cache.
        """
        return self.takes(x, given) and not has_hooks(self.parts) and self.watch is not None and self.watch.holds()

    def takes(self, x: Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the layer was tried with such arguments."""
        return (
            x.shape == (1, 1, self.width)
            and x.dtype == self.dtype
            and x.device.type == "cpu"
            and not x.requires_grad
            and given.get("attention_mask") is None
            and self._turns(given.get("position_embeddings"))
            and ALL_ATTENTION_FUNCTIONS.get(self._implementation) is self._function
            and is_plain(given.get("past_key_values"), self.layer)
            and all(name in _ARGUMENTS or self._was_tried(name, value) for name, value in given.items())
        )

    def _turns(self, rotary: Any) -> bool:
        """Whether it is the cosine and the sine of one position, for whole heads."""
        if not (isinstance(rotary, tuple) and len(rotary) == 2):
            return False
        return all(part.dtype == self.dtype and part.numel() == self.head for part in rotary)

    def _was_tried(self, name: str, value: Any) -> bool:
        """Whether an argument, which the layer passes on or ignores, can make no difference."""
        tried = self._tried.get(name, value)
        return name in self._tried and (isinstance(value, Tensor) if tried is _ANY else value is tried)

    def _run(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        q, k, v = self._project(x, rotary)
        keys, values = append(cache, self.layer, k, v, self.cache_kind)
        out: Tensor = self.output(self.kernel.attend(q, keys, values).view(1, 1, -1))
        return out

    def _project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[1, 1, D] -> [H * d], [1, G, 1, d], [1, G, 1, d]."""
        q, k, v = (torch.empty(size, dtype=self.dtype) for size in self._sizes)
        self.kernel.project(x, *rotary, q, k, v)
        return q, k.view(1, -1, 1, self.head), v.view(1, -1, 1, self.head)

    def agrees(self) -> bool:
        """Whether it computes what the layer did, tried with small and with large scores.

        Decoders pass on more than an attention layer reads. It is tried with all of that, then without.
        """
        for more in (_PASSED_ON, {}):
            self._tried = more
            if self._agrees():
                return True
        return False

    def _agrees(self) -> bool:
        random = torch.Generator().manual_seed(0)
        scale = 1.0
        for turn in range(2):
            x, rotary, caches = self.trial(scale, random)
            given = {"hidden_states": x, "position_embeddings": rotary, "attention_mask": None} | self.more(turn)
            try:
                wanted = self._original(**given, past_key_values=caches[0])
            except Exception:  # it wants other arguments
                return False
            if not (isinstance(wanted, tuple) and len(wanted) == 2 and isinstance(wanted[0], Tensor)):
                return False
            got = self._run(x, rotary, caches[1])
            mine, theirs = caches[1].layers[self.layer], caches[0].layers[self.layer]
            pairs = [(got, wanted[0]), (mine.keys, theirs.keys), (mine.values, theirs.values)]
            if not all(near(a, b) for a, b in pairs):
                return False
            scale = (_LARGEST_SCORE / max(self._largest_score(x, rotary, mine.keys), 1e-6)) ** 0.5
        return True

    def more(self, turn: int) -> dict[str, Any]:
        """What else the layer is tried with; positions differ from turn to turn, and must make no difference."""
        return {name: torch.tensor([[turn * 1000]]) if value is _ANY else value for name, value in self._tried.items()}

    def trial(self, scale: float, random: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor], list[DynamicCache]]:
        """A random token [1, 1, D] of that size, its rotary embedding, and two equal caches with some tokens."""
        x = torch.randn(1, 1, self.width, generator=random).mul_(scale).to(self.dtype)
        angles = torch.rand(1, 1, self.head // 2, generator=random).mul_(6).repeat(1, 1, 2)
        rotary = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        past, caches = self.past(scale, random), [DynamicCache(), DynamicCache()]
        for cache in caches:
            cache.update(*past, self.layer)
        return x, rotary, caches

    def past(self, scale: float, random: torch.Generator) -> list[Tensor]:
        """Random keys and values of some tokens, [1, G, S, d]."""
        sizes = [(1, size // self.head, _PAST, self.head) for size in self._sizes[1:]]
        return [torch.randn(size, generator=random).mul_(scale).to(self.dtype) for size in sizes]

    def _largest_score(self, x: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor) -> float:
        """Of this token's queries against keys [1, G, S, d]."""
        query = self._project(x, rotary)[0].float().view(keys.shape[1], -1, self.head)  # [G, H / G, d]
        largest = (query @ keys[0].float().transpose(1, 2)).abs().max()
        return float(largest) * float(self._scaling)


def _looks_known(module: Any) -> bool:
    children = dict(module.named_children())
    projections = [children.get(name) for name in _PROJECTIONS]
    if not all(isinstance(one, PackedLinear) and one.matrix.order is None for one in projections):
        return False
    norms = [children.get(name) for name in _NORMS]
    if (norms[0] is None) != (norms[1] is None) or not all(norm is None or norm_of(norm) for norm in norms):
        return False
    if set(children) - {*_PROJECTIONS, *_NORMS, "rotary_emb"} or list(module.parameters(recurse=False)):
        return False
    if not all(hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx")) or module.head_dim % 16:
        return False
    limits = (getattr(module.config, name, None) for name in ("clip_qkv", "attn_logit_softcapping", "logits_soft_cap"))
    return module.o_proj.weight_dtype in _TOLERANCE and not any(limits)


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two results are one up to the roundings of their dtype."""
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= _TOLERANCE[b.dtype] * b.float().norm())
