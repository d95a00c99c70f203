"""Where the dense part of a model runs and slots are: the host alone, a CUDA GPU, or an emulated one."""

from __future__ import annotations

import torch

from ...errors import RequestError
from .base import Copy, Device, HostBatch, Queued
from .cuda import CudaDevice
from .emulated import EmulatedDevice
from .host import HostDevice

DEVICE_NAMES = ("auto", "cpu", "cuda", "emulated")


def make_device(name: str) -> Device:
    """The device of that name; `auto` is `cuda` where there is one, else `cpu`.

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
        return CudaDevice()
    return EmulatedDevice() if name == "emulated" else HostDevice()


__all__ = ["DEVICE_NAMES", "Copy", "Device", "HostBatch", "Queued", "make_device"]
