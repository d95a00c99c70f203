"""The store: every expert's packed weights in RAM, one copy each, in one mapping.

Decides where in the mapping an expert's bytes are. Knows neither formats nor devices: bytes in, bytes
out. Weights never change once loaded, so there is no dirty state and nothing is ever written back.
Experts that are held on the GPU for good have no bytes here.

    >>> store = ExpertStore([[4096] * 8] * 2, absent={(0, 3)})
    >>> store[1, 5].shape
    torch.Size([4096])
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ExpertStore:
    """One anonymous mapping with a view for each expert.

    Args:
        expert_bytes: for each MoE layer, the packed bytes of each of its experts.
        absent: experts that live elsewhere and get no bytes.
    """

    def __init__(
        self, expert_bytes: Sequence[Sequence[int]], absent: Collection[tuple[int, int]] = frozenset()
    ) -> None:
        self._spans: dict[tuple[int, int], tuple[int, int]] = {}
        self.n_bytes = 0
        for layer, sizes in enumerate(expert_bytes):
            for expert, size in enumerate(sizes):
                if (layer, expert) not in absent:
                    self._spans[layer, expert] = (self.n_bytes, size)
                    self.n_bytes += size
        self.memory = map_memory(self.n_bytes)
        self._views: dict[tuple[int, int], Tensor] = {}  # made once: a step asks for eight of them a layer

    @property
    def experts(self) -> Collection[tuple[int, int]]:
        """All that have bytes here."""
        return self._spans.keys()

    def __contains__(self, expert: tuple[int, int]) -> bool:
        return expert in self._spans

    def __getitem__(self, expert: tuple[int, int]) -> Tensor:
        """The packed bytes of an expert: uint8, contiguous, a view of the mapping."""
        view = self._views.get(expert)
        if view is None:
            start, size = self._spans[expert]
            view = self._views[expert] = self.memory[start : start + size]
        return view


def map_memory(n_bytes: int) -> Tensor:
    """Zeroed memory of the process, in huge pages where allowed: uint8 [n_bytes].

    Its pages are laid when they are first written. Lives as long as the tensor and its views.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        mapping = mmap.mmap(-1, max(n_bytes, 1))
    else:
        # Private, because a shared mapping gets no transparent huge pages, which walking it end to end wants.
        mapping = mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)[:n_bytes]


@contextmanager
def on_host(target: Tensor) -> Iterator[Tensor]:
    """Memory of the host to write in the place of a tensor's, which it is copied to at the end; its own if it is there.

    Args:
        target: uint8, contiguous.
    """
    written = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
    yield written
    if written is not target:
        target.copy_(written)
