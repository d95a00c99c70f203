"""How model families write their experts down, read off the modules themselves, not from a table of names.

Every family that calls its experts through Transformers' interface marks its experts class with what it
has (a gate, biases, transposed weights ...). This file turns the marks into one `FamilyLayout`. Knows
Transformers' conventions; does not know where experts live or who computes them.

Legend: E experts, D model width, F expert neurons, f neurons of a share.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compute.experts import Activation
from .errors import ModelError
from .memory.formats import ExpertShape

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel")


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """The modules whose experts go through Transformers' experts interface, by name, in model order."""
    return {name: module for name, module in model.named_modules() if all(hasattr(module, mark) for mark in _MARKS)}


@dataclass(frozen=True, slots=True)
class FamilyLayout:
    """How one experts module writes its weights down.

    transposed: weights are [E, in, out] instead of [E, out, in].
    interleaved: gate and up rows alternate instead of following one another.
    """

    experts: int
    shape: ExpertShape
    transposed: bool
    interleaved: bool

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
        layout = cls(experts, shape, transposed, has_gate and not module.is_concatenated)
        for part, size in layout.parameters.items():
            found = getattr(module, part, None)
            if found is None or tuple(found.shape) != (experts, *size):
                raise ModelError(f"{name}.{part} is {found if found is None else list(found.shape)}; no known layout")
        return layout

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


def activation_of(module: Any, layout: FamilyLayout) -> Activation:
    """The family's own gate, called with gate and up in the order that it expects them."""

    owner: Any = weakref.ref(module)  # the module knows its conductor, which keeps this function

    def apply(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return owner().act_fn(up)  # type: ignore[no-any-return]
        both = torch.stack((gate, up), -1).flatten(-2) if layout.interleaved else torch.cat((gate, up), -1)
        return owner()._apply_gate(both)  # type: ignore[no-any-return]

    return apply


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
