"""Attention in two calls instead of some thirty operations: swapped in where it computes the same.

Before the cache: the three projections in one go, norms and the rotary embedding. Behind it: the queries against
all keys and values, of a step or of a prompt. The cache stays Transformers' own, and so does all that has a mask which
says more than where each sequence begins (masks.py). Which layers are plain enough is found by trying them on numbers.

Legend: B sequences, N new tokens of each, T = B * N, D model width, H query heads, G key heads, d their width, S tokens
in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...compute.eager import outside_of_graphs
from ...compute.few_tokens import StepAttention
from ..dense import PackedLinear
from ..hooks import Fused, has_hooks, put_in_place
from .cache import CacheKind, append, is_plain, length_of
from .masks import MOST_TOKENS, reads, seen_in, trial_mask
from .norm import norm_of

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_PAST = 6  # tokens in the cache of a trial
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
_LARGEST_SCORE = 25.0  # of the second trial: far enough for a soft cap to show
MOST_PROMPT_TOKENS = 2**20  # that the kernels take at once
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def fuse_attention(module: nn.Module, threads: int) -> bool:
    """Give an attention layer a forward of ours, if it is one that we know; says whether it is."""
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


class Trial(NamedTuple):
    """So many new tokens of each of so many sequences, which a layer is tried with, behind so many in the cache."""

    sequences: int
    new: int
    is_masked: bool = False
    past: int = _PAST


TRIALS = (Trial(2, 1), Trial(2, 1, is_masked=True), Trial(2, 3, is_masked=True))
# A prompt, one that is padded, and a chunk of one.
_PROMPTS = (Trial(2, 19, past=0), Trial(2, 17, is_masked=True, past=0), Trial(2, 17, is_masked=True))


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
        self.most_tokens = 1  # of a step
        self.reads_prompts = False
        q, k, v = (getattr(module, name) for name in _PROJECTIONS[:3])
        self.dtype, self.head = module.o_proj.weight_dtype, module.head_dim
        self.width, self._scaling = q.in_features, module.scaling
        self._sizes = (q.out_features, k.out_features, v.out_features)
        self.cache_kind = CacheKind(self.dtype, k.out_features // self.head, self.head)
        self.kernel = StepAttention(
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
        if (seen := self.seen(x, kwargs, padded=self.reads_prompts)) is None:
            return self._original(*args, **kwargs)
        return self._run(x, kwargs["position_embeddings"], kwargs["past_key_values"], seen), None

    def fits(self, x: Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the layer is what it was, has no hooks inside, and is given what it was tried with.

        That are a plain cache, and a mask that may be one that is known.
        """
        if self.reads_prompts:
            takes = self._takes(x, given, MOST_PROMPT_TOKENS, reads_prompt=True)
        else:
            takes = self.takes(x, given)
        return takes and not has_hooks(self.parts) and self.watch is not None and self.watch.holds()

    def takes(self, x: Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the layer was tried with such arguments, of few tokens; of the mask, `seen` says."""
        return self._takes(x, given, self.most_tokens, reads_prompt=False)

    def _takes(self, x: Tensor, given: Mapping[str, Any], most_tokens: int, *, reads_prompt: bool) -> bool:
        cache = given.get("past_key_values")
        if not is_plain(cache, self.layer):
            return False
        past = length_of(cache, self.layer) if reads_prompt else None
        return (
            x.dim() == 3
            and x.shape[2] == self.width
            and 1 <= x.shape[0] * x.shape[1] <= most_tokens
            and x.dtype == self.dtype
            and x.device.type == "cpu"
            and not x.requires_grad
            and reads(given.get("attention_mask"), x.shape[0], x.shape[1], past)
            and self._turns(x, given.get("position_embeddings"))
            and ALL_ATTENTION_FUNCTIONS.get(self._implementation) is self._function
            and all(name in _ARGUMENTS or self._was_tried(name, value) for name, value in given.items())
        )

    def seen(self, x: Tensor, given: Mapping[str, Any], *, padded: bool = False) -> Tensor | None:
        """What each token sees of the cache when the step's own are there, as `seen_in` has it; None if not known."""
        sequences, new = x.shape[:2]
        length = length_of(given["past_key_values"], self.layer) + new
        return seen_in(given.get("attention_mask"), sequences, new, length, padded=padded)

    def _turns(self, x: Tensor, rotary: Any) -> bool:
        """Whether it is the cosine and the sine of each token's position, for whole heads."""
        if not (isinstance(rotary, tuple) and len(rotary) == 2):
            return False
        new = x.shape[1]
        shapes = ((1, new, self.head), (x.shape[0], new, self.head))
        return all(part.dtype == self.dtype and tuple(part.shape) in shapes for part in rotary)

    def _was_tried(self, name: str, value: Any) -> bool:
        """Whether an argument, which the layer passes on or ignores, can make no difference."""
        tried = self._tried.get(name, value)
        return name in self._tried and (isinstance(value, Tensor) if tried is _ANY else value is tried)

    def _run(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Any, seen: Tensor) -> Tensor:
        q, k, v = self._project(x, rotary)
        keys, values = append(cache, self.layer, k, v, self.cache_kind)
        out: Tensor = self.output(self.kernel.attend(q, keys, values, seen).view(*x.shape[:2], -1))
        return out

    def _project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> [T, H * d], [B, G, N, d], [B, G, N, d]."""
        sequences, new = x.shape[:2]
        q, k, v = (torch.empty(sequences * new, size, dtype=self.dtype) for size in self._sizes)
        self.kernel.project(x, *rotary_of(x, rotary), q, k, v)
        k, v = (part.view(sequences, new, -1, self.head).transpose(1, 2) for part in (k, v))
        return q, k, v

    def agrees(self) -> bool:
        """Whether it computes what the layer did, tried with small and with large scores.

        Decoders pass on more than an attention layer reads. It is tried with all of that, then without. Where it agrees
        for one token, it is tried with several of two sequences, too, of which one is padded on the left, and then with
        prompts.
        """
        for more in (_PASSED_ON, {}):
            self._tried = more
            if self._agrees(Trial(1, 1)):
                self.most_tokens = MOST_TOKENS if all(self._agrees(trial) for trial in TRIALS) else 1
                self.reads_prompts = self.most_tokens > 1 and all(self._agrees(trial) for trial in _PROMPTS)
                return True
        return False

    def _agrees(self, of: Trial) -> bool:
        random = torch.Generator().manual_seed(0)
        scale = 1.0
        for turn in range(2):
            x, rotary, caches = self.trial(scale, random, of)
            mask = self.trial_mask(of)
            if mask is None and of.is_masked:
                return False
            given = {"hidden_states": x, "position_embeddings": rotary, "attention_mask": mask} | self.more(turn)
            seen = seen_in(mask, of.sequences, of.new, of.past + of.new, padded=True)
            if seen is None:  # padding that is weighed all the same
                return True
            try:
                wanted = self._original(**given, past_key_values=caches[0])
            except Exception:  # it wants other arguments
                return False
            if not (isinstance(wanted, tuple) and len(wanted) == 2 and isinstance(wanted[0], Tensor)):
                return False
            got = self._run(x, rotary, caches[1], seen)
            mine, theirs = caches[1].layers[self.layer], caches[0].layers[self.layer]
            pairs = [(got, wanted[0]), (mine.keys, theirs.keys), (mine.values, theirs.values)]
            if not all(near(a, b) for a, b in pairs):
                return False
            scale = (_LARGEST_SCORE / max(self._largest_score(x, rotary, mine.keys), 1e-6)) ** 0.5
        return True

    def more(self, turn: int) -> dict[str, Any]:
        """What else the layer is tried with; positions differ from turn to turn, and must make no difference."""
        return {name: torch.tensor([[turn * 1000]]) if value is _ANY else value for name, value in self._tried.items()}

    def trial(
        self, scale: float, random: torch.Generator, of: Trial
    ) -> tuple[Tensor, tuple[Tensor, Tensor], list[DynamicCache]]:
        """Random tokens [B, N, D] of that size, their rotary embedding, and two equal caches with some tokens."""
        shape = of.sequences, of.new
        x = torch.randn(*shape, self.width, generator=random).mul_(scale).to(self.dtype)
        angles = torch.rand(*shape, self.head // 2, generator=random).mul_(6).repeat(1, 1, 2)
        rotary = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        past, caches = self.past(scale, random, of.sequences), [DynamicCache(), DynamicCache()]
        for cache in caches:
            if of.past:
                cache.update(*past, self.layer)
        return x, rotary, caches

    def trial_mask(self, of: Trial) -> Tensor | None:
        """The mask of a trial; None if it has none, or if it is not known what the layer takes."""
        if not of.is_masked:
            return None
        firsts = [sequence * 2 for sequence in range(of.sequences)]
        return trial_mask(self._implementation, self.dtype, firsts, of.new, of.past + of.new)

    def past(self, scale: float, random: torch.Generator, sequences: int = 1) -> list[Tensor]:
        """Random keys and values of some tokens, [B, G, S, d]."""
        sizes = [(sequences, size // self.head, _PAST, self.head) for size in self._sizes[1:]]
        return [torch.randn(size, generator=random).mul_(scale).to(self.dtype) for size in sizes]

    def _largest_score(self, x: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor) -> float:
        """Of these tokens' queries against keys [B, G, S, d]."""
        sequences, heads = keys.shape[:2]
        query = (
            self._project(x, rotary)[0].float().view(sequences, -1, heads, self._sizes[0] // self._sizes[1], self.head)
        )
        largest = torch.einsum("bngqd,bgsd->bngqs", query, keys.float()).abs().max()
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


def rotary_of(x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rotary embedding of each token of x [B, N, D], [B, N, d], where it may be the same for all sequences."""
    cosine, sine = (part.expand(x.shape[0], -1, -1) for part in rotary)
    return cosine, sine


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two results are one up to the roundings of their dtype."""
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= _TOLERANCE[b.dtype] * b.float().norm())
