"""Where the dense part of a model runs and slots are: the host alone, a CUDA GPU, or an emulated one."""

from __future__ import annotations

import torch

from ..errors import RequestError
from ..planning.options import DEVICE_NAMES
from .base import Accelerator, Device
from .cuda import CudaDevice
from .emulated import EmulatedDevice
from .host import HostDevice
from .port import LayerPort
from .work import HeldLayer, HostBatch, Queued, StepSum


def make_device(name: str, link_gbps: float | None = None) -> Device:
    """The device of that name; `auto` is `cuda` where there is one, else `cpu`.

    Args:
        link_gbps: a pace for its link, in GB/s; None for its own.

    Raises:
        RequestError: no such device name, or no CUDA GPU on this machine.
    """
    if name not in DEVICE_NAMES:
        raise RequestError(f"no device {name!r}; there are: {', '.join(DEVICE_NAMES)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise RequestError("--device cuda, but torch sees no CUDA GPU here; use --device cpu or emulated")
        return CudaDevice(link_gbps)
    if name == "emulated":
        return EmulatedDevice() if link_gbps is None else EmulatedDevice(link_gbps=link_gbps)
    if link_gbps is not None:
        raise RequestError("--link needs a device with a link; use it with --device cuda or emulated")
    return HostDevice()


__all__ = [
    "Accelerator",
    "Device",
    "HeldLayer",
    "HostBatch",
    "LayerPort",
    "Queued",
    "StepSum",
    "make_device",
]
