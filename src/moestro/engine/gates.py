"""Finds the router (gate) that feeds an experts module, by shape and place, and guesses with it ahead of time.

A router is a module beside the experts, not inside them, with a matrix of one row an expert. Knows no
family; says None where nothing, or more than one thing, looks like a router. How its logits become a choice is found
by comparing a few such rules with what the model chose.

Legend: T tokens, K top-k, D model width, E experts, G guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..planning.contract import SCORE, guesses_kept


def find_router(model: nn.Module, experts_name: str) -> nn.Module | None:
    """The module that owns the [E, *] matrix which scores the experts, or None.

    Looks in the experts' parent first and then one level up, where some families keep the router.
    """
    experts = model.get_submodule(experts_name)
    parent_name = experts_name
    for _ in range(2):
        parent_name = parent_name.rpartition(".")[0]
        found = _routers_in(model.get_submodule(parent_name), experts)
        if found:
            return found[0] if len(found) == 1 else None
    return None


def find_gate(model: nn.Module, experts_name: str) -> Gate | None:
    """The router of an experts module as a guesser; None where none was found."""
    router = find_router(model, experts_name)
    return None if router is None else Gate(router, model.get_submodule(experts_name.rpartition(".")[0]))


def _routers_in(parent: nn.Module, experts: nn.Module) -> list[nn.Module]:
    """Modules below `parent`, outside any experts module, that own a matrix of one row an expert."""
    inside = {id(module) for module in experts.modules()}
    return [
        module
        for module in parent.modules()
        if id(module) not in inside
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.dim() == 2
        and weight.shape[0] == experts.num_experts
    ]


class Gate:
    """A router as a guesser: applied to an earlier layer's hidden states (Eliseev and Mazur, section 3.2).

    agreement: how many of its layer's own choices the best rule gives, as a share; None before `learn`, and where the
    router does not look at the experts' input at all. Below 1 where it chooses in a way not known here.

    Args:
        router: owns the matrix [E, D]. block: what holds it, which may hold a correction of its scores.
    """

    def __init__(self, router: nn.Module, block: nn.Module | None = None) -> None:
        self._router: Any = router
        self._block = None if block is None else ref(block)  # whose experts hold the conductor, which holds this
        self._rule = _Rule(_softmax)
        self._fits = True
        self.agreement: float | None = None

    @torch.no_grad()
    def learn(self, x: Tensor, index: Tensor) -> None:
        """Find the rule by which this router chose, once: x [T, D], index [T, K] of its own layer."""
        if self.agreement is not None or not self._fits:
            return
        experts, self._fits = self._router.weight.shape[0], x.shape[-1] == self._router.weight.shape[1]
        if not self._fits or not ((index >= 0) & (index < experts)).any():
            return
        vectors = [name for name, vector in self._vectors().items() if vector.numel() == experts]
        plain = [_Rule(_softmax), *(_Rule(choose, name) for name in vectors for choose in (_softmax, _sigmoid))]
        best = max(plain, key=lambda rule: self._agreement(rule, x, index))
        if self._agreement(best, x, index) < 1:
            grouped = [
                _Rule(rule.choose, rule.vector, (groups, kept, summed))
                for rule in (*plain, _Rule(_sigmoid))
                for groups in _GROUPS
                if experts % groups == 0 and experts > groups
                for kept in range(1, groups)
                for summed in (1, 2)
            ]
            best = max([best, *grouped], key=lambda rule: self._agreement(rule, x, index))
        self._rule, self.agreement = best, self._agreement(best, x, index)

    def _agreement(self, rule: _Rule, x: Tensor, index: Tensor) -> float:
        ours = (index >= 0) & (index < self._router.weight.shape[0])  # the others belong to other ranks
        found = self._scores(x, rule).topk(index.shape[1], dim=-1).indices.to(index.device)  # [T, K]
        same = (index[:, :, None] == found[:, None, :]).any(-1) & ours  # [T, K]
        return float(same.sum() / ours.sum().clamp(min=1))

    @torch.no_grad()
    def guess(self, x: Tensor) -> Tensor | None:
        """How much of the tokens' attention each expert would get: x [T, D] -> float32 [E], which sum to 1."""
        if not self._fits or x.shape[-1] != self._router.weight.shape[1]:
            return None
        scores = self._scores(x, self._rule)
        return (scores / scores.sum(-1, keepdim=True)).mean(0)

    def _scores(self, x: Tensor, rule: _Rule) -> Tensor:
        """[T, E], positive."""
        weight = self._router.weight
        logits = torch.nn.functional.linear(x.to(weight.dtype), weight).float()
        scores: Tensor = rule.choose(logits, self._vectors()[rule.vector].float() if rule.vector else None)
        return scores if rule.groups is None else _in_best_groups(scores, *rule.groups)

    def _vectors(self) -> dict[str, Tensor]:
        """Parameters and buffers of router and block, by a name of our own."""
        block = None if self._block is None else self._block()
        owners = [self._router] if block is None or block is self._router else [self._router, block]
        return {
            f"{i}.{name}": tensor.flatten()
            for i, owner in enumerate(owners)
            for name, tensor in (*owner.named_parameters(), *owner.named_buffers())
            if tensor.numel() == max(tensor.shape, default=0) and ".experts." not in f".{name}"
        }


def guess_next(gates: Sequence[Gate | None], x: Tensor, top_k: int) -> Tensor | None:
    """What the next layers' gates make of this layer's hidden states [T, D]; never waits for the host.

    Returns:
        int32 [ahead, 2, G]: experts, the likeliest first, and their shares of the attention in units of 1 / 65535; 0
        for none. None where no gate says anything.
    """
    found = [None if gate is None else gate.guess(x) for gate in gates]
    if all(scores is None for scores in found):
        return None
    kept = guesses_kept(top_k)
    rows = []
    for scores in found:
        row = torch.zeros(2, kept, dtype=torch.int32, device=x.device)
        if scores is not None:
            best = scores.topk(min(kept, len(scores)))
            row[0, : len(best.indices)] = best.indices
            row[1, : len(best.indices)] = (best.values * SCORE).round().clamp(max=SCORE)
        rows.append(row)
    return torch.stack(rows)


_GROUPS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class _Rule:
    """How logits become scores.

    vector: the name of a correction. groups: how many there are, how many of them are kept, and how many of a group's
    best scores are summed to rank it (DeepSeek-V2 takes the best one, V3 the best two).
    """

    choose: Callable[[Tensor, Tensor | None], Tensor]
    vector: str = ""
    groups: tuple[int, int, int] | None = None


def _softmax(logits: Tensor, vector: Tensor | None) -> Tensor:
    return torch.softmax(logits if vector is None else logits + vector, dim=-1)


def _sigmoid(logits: Tensor, vector: Tensor | None) -> Tensor:
    """Each expert by itself, with a correction that counts only for the choice (DeepSeek-V3's)."""
    scores = torch.sigmoid(logits) + (0.0 if vector is None else vector)
    return scores - scores.amin(-1, keepdim=True).clamp(max=0.0) + 1e-9


def _in_best_groups(scores: Tensor, groups: int, kept: int, summed: int) -> Tensor:
    """Scores [T, E] with those outside the best groups near 0."""
    parts = scores.unflatten(-1, (groups, -1))  # [T, G, E / G]
    best = parts.topk(min(summed, parts.shape[-1]), dim=-1).values.sum(-1).topk(kept, dim=-1).indices  # [T, kept]
    mask = torch.full(parts.shape[:-1], 1e-9, device=scores.device).scatter(-1, best, 1.0)  # [T, G]
    masked: Tensor = parts * mask[..., None]
    return masked.flatten(-2)
