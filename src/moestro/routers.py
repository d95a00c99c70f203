"""Finds the router (gate) that feeds an experts module, by shape and place, and guesses with it ahead of time.

A router is a module beside the experts, not inside them, with a matrix of one row an expert. Knows no
family; says None where nothing, or more than one thing, looks like a router. How its logits become a choice is found
by comparing a few such rules with what the model chose.

    Gate(find_router(model, "model.layers.1.mlp.experts")).guess(hidden states of layer 0)

Legend: T tokens, K top-k, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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

    agreement: how many of its layer's own choices the best rule gives, as a share; None before `learn`. Below 1 where
    a family's router looks at something else than the experts' input, or chooses in a way not known here.
    """

    def __init__(self, router: Any) -> None:
        self._router = router
        self._rule: tuple[_Rule, str] = (_softmax, "")
        self.agreement: float | None = None

    @torch.no_grad()
    def learn(self, x: Tensor, index: Tensor) -> None:
        """Find the rule by which this router chose, once: x [T, D], index [T, K] of its own layer."""
        if self.agreement is not None:
            return
        experts = self._router.weight.shape[0]
        ours = index < experts
        vectors = [name for name, v in self._vectors() if v.shape == (experts,)]
        rules = [(_softmax, ""), *((rule, name) for name in vectors for rule in (_softmax, _sigmoid))]
        shares = []
        for rule in rules:
            best = self._scores(x, rule).topk(index.shape[1], dim=-1).indices.to(index.device)  # [T, K]
            found = (index[:, :, None] == best[:, None, :]).any(-1)
            shares.append(float((found & ours).sum() / ours.sum().clamp(min=1)))
        self.agreement = max(shares)
        self._rule = rules[shares.index(self.agreement)]

    @torch.no_grad()
    def guess(self, x: Tensor) -> Tensor | None:
        """How much of the tokens' attention each expert would get: x [T, D] -> float32 [E], which sum to 1."""
        if x.shape[-1] != self._router.weight.shape[1]:
            return None
        scores = self._scores(x, self._rule)
        return (scores / scores.sum(-1, keepdim=True)).mean(0)

    def _scores(self, x: Tensor, rule: tuple[_Rule, str]) -> Tensor:
        """[T, E], positive."""
        weight = self._router.weight
        logits = torch.nn.functional.linear(x.to(weight.dtype), weight).float()
        choose, name = rule
        vector = dict(self._vectors())[name].float() if name else None
        return choose(logits, vector)

    def _vectors(self) -> list[tuple[str, Tensor]]:
        return [*self._router.named_parameters(recurse=False), *self._router.named_buffers(recurse=False)]


_Rule = Callable[[Tensor, Tensor | None], Tensor]


def _softmax(logits: Tensor, vector: Tensor | None) -> Tensor:
    return torch.softmax(logits if vector is None else logits + vector, dim=-1)


def _sigmoid(logits: Tensor, vector: Tensor | None) -> Tensor:
    """Each expert by itself, with a correction that counts only for the choice (DeepSeek-V3's)."""
    scores = torch.sigmoid(logits) + (0.0 if vector is None else vector)
    return scores - scores.amin(-1, keepdim=True).clamp(max=0.0) + 1e-9
