"""Finds the router (gate) that feeds an experts module, by shape and place, not by a table of names.

A router is a module beside the experts, not inside them, with a matrix of one row an expert. Knows no
family; says None where nothing, or more than one thing, looks like a router.

    find_router(model, "model.layers.0.mlp.experts")
"""

from __future__ import annotations

from torch import nn


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
