"""How model families write their experts down, read off the modules themselves, not from a table of names.

Every family that calls its experts through Transformers' interface marks its experts class with what it
has (a gate, biases, transposed weights ...). This file turns the marks into one `FamilyLayout`. Knows
Transformers' conventions; does not know where experts live or what computes them.

Legend: E experts, D model width, F expert neurons, f neurons of a share.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..memory.formats import ExpertShape
from .watch import GLOBAL_HOOKS

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel")


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """The modules whose experts go through Transformers' experts interface, by name, in model order."""
    return {name: module for name, module in model.named_modules() if all(hasattr(module, mark) for mark in _MARKS)}


@dataclass(frozen=True, slots=True)
class FamilyLayout:
    """How one experts module writes its weights down.

    transposed: weights are [E, in, out] instead of [E, out, in].
    interleaved: gate and up rows alternate instead of following one another.
    post_norm: a norm follows each expert.
    """

    experts: int
    shape: ExpertShape
    transposed: bool
    interleaved: bool
    post_norm: bool

    @classmethod
    def of(cls, name: str, module: Any) -> FamilyLayout:
        """Read the layout of an experts module.

        Raises:
            ModelError: the module keeps its weights in a way that is not known.
        """
        has_gate, transposed = bool(module.has_gate), bool(module.is_transposed)
        first = getattr(module, "gate_up_proj" if has_gate else "up_proj", None)
        down = getattr(module, "down_proj", None)
        if not isinstance(first, nn.Parameter) or not isinstance(down, nn.Parameter) or down.dim() != 3:
            raise ModelError(f"{name} ({type(module).__name__}) keeps its expert weights in a way not known here")
        experts = down.shape[0]
        hidden, neurons = (down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2])
        shape = ExpertShape(hidden, neurons, has_gate, bool(module.has_bias))
        interleaved = has_gate and not module.is_concatenated
        layout = cls(experts, shape, transposed, interleaved, bool(module.has_post_expert_norm))
        for part, size in layout.parameters.items():
            found = getattr(module, part, None)
            if found is None or tuple(found.shape) != (experts, *size):
                raise ModelError(f"{name}.{part} is {found if found is None else list(found.shape)}; no known layout")
        return layout

    @property
    def count(self) -> int:
        """How many weights all experts of the module have, biases too."""
        return self.experts * sum(math.prod(size) for size in self.parameters.values())

    def misfit(self, module: Any) -> str | None:
        """What a module says of its experts that is not so; None where all of it is."""
        said = {
            "num_experts": (module.num_experts, self.experts),
            "has_gate": (module.has_gate, self.shape.has_gate),
            "has_bias": (module.has_bias, self.shape.has_bias),
            "has_post_expert_norm": (module.has_post_expert_norm, self.post_norm),
            "is_transposed": (module.is_transposed, self.transposed),
            "is_concatenated": (module.is_concatenated or not self.shape.has_gate, not self.interleaved),
        }
        return next((name for name, (value, so) in said.items() if value != so), None)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The family's own expert parameters: name -> shape of one expert of it."""
        d, f = self.shape.hidden, self.shape.neurons
        first, rows = ("gate_up_proj", 2 * f) if self.shape.has_gate else ("up_proj", f)
        sizes: dict[str, tuple[int, ...]] = {first: (rows, d), "down_proj": (d, f)}
        if self.transposed:
            sizes = {name: size[::-1] for name, size in sizes.items()}
        if self.shape.has_bias:
            sizes |= {f"{first}_bias": (rows,), "down_proj_bias": (d,)}
        return sizes

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Views of one expert's part of a parameter, named and shaped as `ExpertShape.parts`.

        Args:
            name: the parameter's own name, e.g. "gate_up_proj".
            tensor: one expert of it: a matrix, or a bias [out].
        """
        kind, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
        suffix = "_bias" if is_bias else ""
        rows = tensor.T if self.transposed and not is_bias else tensor  # [out, in] | [out]
        if kind != "gate_up_proj":
            return {kind.removesuffix("_proj") + suffix: rows}
        f = self.shape.neurons
        gate, up = (rows[0::2], rows[1::2]) if self.interleaved else (rows[:f], rows[f:])
        return {"gate" + suffix: gate, "up" + suffix: up}


class _InStore(nn.Module):
    """What an experts module becomes whose weights are in the store: it says so where it is asked for them."""

    _stored: frozenset[str]  # the names of its own parameters

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._stored:
            raise ModelError(f"{name} is not in the model: {_WHERE}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self)._stored:
            raise ModelError(f"{name} cannot be changed: {_WHERE}")
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if found := [name for name in type(self)._stored if f"{prefix}{name}" in state_dict]:
            raise ModelError(f"{prefix}{min(found)} cannot be loaded into the model: {_WHERE}")
        super()._load_from_state_dict(state_dict, prefix, *args)


_WHERE = "Moestro has packed the experts into its store; change the checkpoint and load it again"


def keep_in_store(module: Any, layout: FamilyLayout) -> None:
    """Have an experts module refuse to show or to take weights, which would not be those that are computed with."""
    family: Any = type(module)
    module.__class__ = _stored_class(family, frozenset(layout.parameters))


@functools.cache
def _stored_class(family: type, names: frozenset[str]) -> type:
    return type(family.__name__, (_InStore, family), {"__module__": family.__module__, "_stored": names})


class FamilyActivation:
    """The family's own gate, called with gate and up in the order that it expects them.

    It keeps no module alive, since the module knows its conductor, which keeps this.
    """

    def __init__(self, module: Any, layout: FamilyLayout) -> None:
        self._find: Any = weakref.ref(module)
        self._interleaved = layout.interleaved

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """[n, f] or None, [n, f] -> [n, f]."""
        if gate is None:
            return self._find().act_fn(up)  # type: ignore[no-any-return]
        both = torch.stack((gate, up), -1).flatten(-2) if self._interleaved else torch.cat((gate, up), -1)
        return self._find()._apply_gate(both)  # type: ignore[no-any-return]

    @property
    def has_hooks(self) -> bool:
        """Whether a module inside has forward hooks, or all modules have, so that it must be called."""
        module = self._find()
        return any(GLOBAL_HOOKS) or any(
            m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module
        )


def post_norm_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The family's norm behind each expert, usable wherever the expert was computed; None without one."""
    if not module.has_post_expert_norm:
        return None

    inner = module.post_expert_norm  # a module below the experts, which does not know the conductor

    def norm(y: Tensor) -> Tensor:
        weights = next(inner.parameters(), y)
        return inner(y.to(weights.device)).to(y.device)  # type: ignore[no-any-return]

    return norm


def why_no_experts(config: Any) -> str:
    """One line on why a model without expert modules cannot be taken."""
    text_config = config.get_text_config()
    parts = [text_config, *(getattr(text_config, name, None) for name in text_config.sub_configs)]
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any((getattr(part, name, None) or 0) > 1 for part in parts for name in counts):
        return (
            f"the experts of {config.model_type} do not pass through Transformers' experts interface, so Moestro "
            "cannot take them; docs/models.md lists the families that work"
        )
    return f"{config.model_type} is a dense model: there are no experts to conduct; run it with Transformers"
