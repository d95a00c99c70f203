"""Fixed-address buffers through which captured graphs exchange one layer's data with the host.

The graph before the experts ends with `leave`, and the one behind begins with `enter`, so what the host must see comes
to it, and what it made goes back, without a call of its own. Layers of a captured step that are alike share a port.

Legend: T tokens, K top-k, D model width, G guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .work import HostBatch, StepSum


class LayerPort:
    """The memory of layer steps of one size.

    Args:
        x, index, guesses: as `leave` will be given them, for shapes and dtypes alone. pool: the slots.
        host_bytes: allocates memory of the host that the device reads and writes without delay.
        wait: until what was asked of the device so far is done.
    """

    def __init__(
        self,
        x: Tensor,
        index: Tensor,
        guesses: Tensor | None,
        pool: Tensor,
        host_bytes: Callable[[int], Tensor],
        wait: Callable[[], None],
    ) -> None:
        n_chosen, n_guesses = index.numel(), 0 if guesses is None else guesses.numel()
        n_bytes = _padded(8 * n_chosen) + _padded(4 * n_chosen) + 4 * n_guesses
        self.total = StepSum(torch.empty_like(x), pool, torch.zeros(x.shape, device=x.device), is_fixed=True)
        self._routing = torch.empty(n_bytes, dtype=torch.uint8, device=x.device)
        self._host_routing = host_bytes(n_bytes)
        self._host_x = host_bytes(x.numel() * x.element_size()).view(x.dtype).view(x.shape)
        self._host_output = host_bytes(x.numel() * 4).view(torch.float32).view(x.shape).zero_()
        self._output_is_used = False
        self._wait = wait
        shapes = (index.shape, index.shape, None if guesses is None else guesses.shape)
        self.index, self.weights, self._guesses = _parts(self._routing, *shapes)
        chosen, masses, marks = _parts(self._host_routing, *shapes)
        self._batch = HostBatch(chosen, masses, self._host_x, marks)

    def leave(self, x: Tensor, index: Tensor, weights: Tensor, guesses: Tensor | None) -> None:
        """Bring the routing and hidden states to their places here and on the host; begin the sum. Can be captured.

        Args:
            x: [T, D]. index: int [T, K]. weights: float [T, K]. guesses: int32 [ahead, 2, G] or None.
        """
        assert self.total.out is not None
        self.total.out.zero_()
        self.total.x.copy_(x)
        self.index.copy_(index)
        self.weights.copy_(weights)
        if self._guesses is not None and guesses is not None:
            self._guesses.copy_(guesses)
        self._host_routing.copy_(self._routing, non_blocking=True)
        self._host_x.copy_(self.total.x, non_blocking=True)

    def read(self) -> HostBatch:
        """Wait until the host has the routing and hidden states, which are valid until the next `read`."""
        self._wait()
        self.total.begin()
        if self._output_is_used:
            self._host_output.zero_()
            self._output_is_used = False
        return self._batch

    def host_output(self) -> Tensor:
        """Zeros for the CPU's part: float32 [T, D], once for each `read`."""
        self._output_is_used = True
        return self._host_output

    def enter(self) -> Tensor:
        """Both parts added in float32: [T, D] in the dtype of x. Can be captured."""
        assert self.total.out is not None
        here = self._host_output.to(self.total.out.device, non_blocking=True)
        return (self.total.out + here).to(self.total.x.dtype)


def _parts(
    memory: Tensor, chosen: Sequence[int], masses: Sequence[int], guesses: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Experts as int64, weights as float32 and guesses as int32, one after another."""
    count = torch.Size(chosen).numel()
    sizes = [_padded(8 * count), _padded(4 * count)]
    index, weights, rest = memory.split([*sizes, memory.numel() - sum(sizes)])
    return (
        index[: 8 * count].view(torch.int64).view(chosen),  # as wide as any router's: a cut index may be an expert's
        weights[: 4 * count].view(torch.float32).view(masses),
        None if guesses is None else rest.view(torch.int32).view(guesses),
    )


def _padded(n_bytes: int) -> int:
    """Kernels are compiled for addresses of 16 bytes."""
    return -(-n_bytes // 16) * 16
