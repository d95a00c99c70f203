"""Which of the kernels' gates a family's activation is: found by trying its own function on numbers, not by its name.

>>> import torch
>>> recognize(lambda gate, up: torch.nn.functional.silu(gate) * up, has_gate=True)
('silu', 0.0, 0.0, 0.0)
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .experts import Activation

Kernel = tuple[str, float, float, float]  # gate's name in the kernels; alpha, limit and offset of the clamped one


def recognize(activation: Activation, has_gate: bool) -> Kernel | None:
    """Which of the kernels' gates computes what `activation` does, found by trying it on numbers.

    The numbers go far enough out to meet a clamp. Compared in float32, in which families compute it. None where a
    module that it calls has hooks, since it must be called then.
    """
    if getattr(activation, "has_hooks", False):
        return None
    # A dimension of its own for each of the two, and not square, so that nothing is mixed up unnoticed.
    gate = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-60.0, -25.0, 25.0, 60.0])])[:, None]
    up = torch.tensor([-60.0, -8.0, -1.0, -0.1, 0.0, 0.3, 2.0, 7.5, 60.0])[None]
    gate, up = (part.expand(gate.shape[0], up.shape[1]).contiguous() for part in (gate, up))
    try:
        with torch.no_grad():
            wanted = activation(gate, up) if has_gate else activation(None, gate)
    except Exception as error:  # a family's function may refuse such input: then the twin calls it in earnest
        warnings.warn(f"the gate {activation} could not be tried ({error}); it runs in plain torch", stacklevel=2)
        return None
    plain = {
        "silu": torch.nn.functional.silu(gate),
        "gelu": torch.nn.functional.gelu(gate),
        "gelu_tanh": torch.nn.functional.gelu(gate, approximate="tanh"),
        "relu2": torch.relu(gate).square(),
    }
    for name, value in plain.items():
        if _same(wanted, value * up if has_gate else value):
            return (name, 0.0, 0.0, 0.0)
    return _recognize_clamped(activation, gate, up, wanted) if has_gate else None


def _recognize_clamped(activation: Activation, gate: Tensor, up: Tensor, wanted: Tensor) -> Kernel | None:
    """gate' * sigmoid(alpha gate') * (up' + offset), both clamped at a limit: solve for the three, then compare."""

    def at(g: float, u: float) -> float:
        return float(activation(torch.tensor([[g]], dtype=torch.float64), torch.tensor([[u]], dtype=torch.float64)))

    small = 0.0625  # below any clamp
    slope = (at(small, small) - at(small, 0.0)) / small  # small * sigmoid(alpha * small)
    if not 0 < slope < small:
        return None
    alpha = float(torch.logit(torch.tensor(slope / small, dtype=torch.float64))) / small
    offset = at(small, 0.0) / slope
    limit = at(small, 1e6) / slope - offset
    alpha, offset, limit = (float(f"{value:.6g}") for value in (alpha, offset, limit))
    clamped = gate.clamp(max=limit)
    value = clamped * torch.sigmoid(alpha * clamped) * (up.clamp(-limit, limit) + offset)
    return ("clamped_swiglu", alpha, limit, offset) if _same(wanted, value) else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)
