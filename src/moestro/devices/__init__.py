"""Where the dense part of a model runs and slots are: the host alone, a CUDA GPU, or an emulated one."""

from __future__ import annotations

import torch

from ..errors import RequestError
from ..planning.options import DEVICE_NAMES
from ..planning.spelling import spelled
from .base import Accelerator, Device
from .cuda import CudaDevice
from .emulated import EmulatedDevice
from .host import HostDevice
from .port import LayerPort
from .work import HeldLayer, HostBatch, Queued, StepSum


def device_class(name: str) -> type[HostDevice | CudaDevice | EmulatedDevice]:
    """The class of the device of that name; `auto` is `cuda` where there is one, else `cpu`.

    Raises:
        RequestError: no such device name, or no CUDA GPU on this machine.
    """
    if name not in DEVICE_NAMES:
        raise RequestError(f"no device {name!r}; there are: {', '.join(DEVICE_NAMES)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            asked, other = spelled("device", "cuda"), spelled("device", "cpu")
            raise RequestError(f"{asked}, but torch sees no CUDA GPU here; use {other} or emulated")
        return CudaDevice
    return EmulatedDevice if name == "emulated" else HostDevice


def has_slots(name: str) -> bool:
    """Whether the device of that name, as in `device_class`, is a GPU or pretends to be one.

    Raises:
        RequestError: as `device_class`.
    """
    return not issubclass(device_class(name), HostDevice)


def make_device(name: str, link_gbps: float | None = None) -> Device:
    """The device of that name, as in `device_class`.

    Args:
        link_gbps: a pace for its link, in GB/s; None for its own.

    Raises:
        RequestError: as `device_class`, or a pace for a device without a link.
    """
    kind = device_class(name)
    if link_gbps is None:
        return kind()
    if issubclass(kind, HostDevice):
        on = spelled("device", "cuda")
        raise RequestError(f"{spelled('link')} needs a device with a link; use it with {on} or emulated")
    return kind(link_gbps=link_gbps)


__all__ = [
    "Accelerator",
    "Device",
    "HeldLayer",
    "HostBatch",
    "LayerPort",
    "Queued",
    "StepSum",
    "device_class",
    "has_slots",
    "make_device",
]
