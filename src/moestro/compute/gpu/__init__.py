"""Experts that are in slots, computed on the GPU straight from their packed bytes, by Triton kernels.

What the kernels do not cover, and everything where Triton is missing, is computed by their twin,
`experts.run_experts`. Nothing here knows of policies or copies.

The number of programs depends on shapes alone and nothing waits for the host: with `plan_on_device` a layer fits
in a CUDA graph whose routing changes from replay to replay.
"""

from __future__ import annotations

from .kernel import GpuKernel, kernel_of, triton_kernels
from .launch import run_grouped, workspace_at_most, workspace_bytes
from .linear import linear_workspace_bytes, look_up, run_linear
from .plan import Plan, plan_of, plan_on_device, slot_of, table_of


def has_kernels() -> bool:
    """Whether Triton is installed."""
    return triton_kernels() is not None


__all__ = [
    "GpuKernel",
    "Plan",
    "has_kernels",
    "kernel_of",
    "linear_workspace_bytes",
    "look_up",
    "plan_of",
    "plan_on_device",
    "run_grouped",
    "run_linear",
    "slot_of",
    "table_of",
    "workspace_at_most",
    "workspace_bytes",
]
