"""What a machine can do, as the rates that policies and the simulation reckon with. Pure arithmetic.

    >>> Costs(cpu_gbps=30, link_gbps=12).link_s(12 * 10**9)
    1.0

A rate is in GB/s (1e9 bytes a second) or GFLOP/s; None where nothing was measured. Two rates bound each piece of
work: how fast its weights are read, and how fast they are multiplied; the slower one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

PIECE_BYTES = 16 * 2**20  # of a copy: between two pieces an urgent one overtakes, live and simulated
BLOCK = 64  # neurons of a block, where a format or the trace of a model names no other number


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One MoE layer as the planner sees it: counts and bytes, no tensors."""

    experts: int
    neurons: int  # F, the expert's hidden size
    expert_bytes: int  # packed, scales and biases included
    splittable: bool = True  # False where a norm follows the expert: its output is no sum over neurons
    hidden: int = 0  # D, the width of the hidden states
    matrices: int = 3  # of an expert: gate, up and down, or without a gate
    block_bytes: int = 0  # of a block; 0 where all of an expert's bytes are in its blocks
    block: int = BLOCK  # neurons of a block; an expert can be divided between blocks
    head_bytes: int = 0  # before the first block, which every share of the expert needs

    @property
    def token_flops(self) -> int:
        """Operations of one token in one expert: a multiply and an add for each weight."""
        return 2 * self.matrices * self.neurons * self.hidden

    def share_bytes(self, neurons: range | None) -> int:
        """Bytes that hold some neurons, from one block's edge to another's or to the end; None for all."""
        if neurons is None:
            return self.expert_bytes
        block_bytes = self.block_bytes or self.expert_bytes // -(-self.neurons // self.block)
        stop = self.head_bytes + neurons.stop // self.block * block_bytes
        start = 0 if self.head_bytes else neurons.start // self.block * block_bytes
        return (self.expert_bytes if neurons.stop >= self.neurons else stop) - start


@dataclass(frozen=True, slots=True)
class Costs:
    """Rates of one machine.

    cpu_beside_link_gbps: what the CPU reads while the link copies, since both share the RAM; None: as alone.
    disk_gbps: None where experts are never on disk.
    cpu_points: of a format whose kernels were measured, (tokens, GB/s), as `rates.Curve` has them; then `cpu_s` goes by
        them and not by the two rates of the CPU alone.
    """

    cpu_gbps: float | None = None
    link_gbps: float | None = None
    gpu_gbps: float | None = None
    cpu_beside_link_gbps: float | None = None
    cpu_gflops: float | None = None
    gpu_gflops: float | None = None
    disk_gbps: float | None = None
    cpu_points: tuple[tuple[int, float], ...] = ()

    def cpu_s(self, layer: LayerSpec, tokens: int, neurons: int | None = None, *, beside_link: bool = False) -> float:
        """Seconds of the CPU for one expert, or some of its neurons; inf where the CPU's rate is not known."""
        gbps = self.cpu_beside_link_gbps if beside_link and self.cpu_beside_link_gbps else self.cpu_gbps
        if self.cpu_points and gbps:
            alone_s = layer.expert_bytes * seconds_per_gb(self.cpu_points, tokens) / 1e9
            read_s = layer.expert_bytes / (gbps * 1e9) if beside_link else 0.0
            return max(alone_s, read_s) * (1 if neurons is None else neurons / layer.neurons)
        return _roofline_s(layer, tokens, neurons, gbps, self.cpu_gflops)

    def gpu_s(self, layer: LayerSpec, tokens: int, neurons: int | None = None) -> float:
        """Seconds of an expert on the GPU, its weights being there."""
        return _roofline_s(layer, tokens, neurons, self.gpu_gbps, self.gpu_gflops)

    def link_s(self, n_bytes: float) -> float:
        """Seconds of the link for so many bytes; inf where its rate is not known."""
        return n_bytes / (self.link_gbps * 1e9) if self.link_gbps else float("inf")


def _roofline_s(layer: LayerSpec, tokens: int, neurons: int | None, gbps: float | None, gflops: float | None) -> float:
    if not gbps:
        return float("inf")
    read_s = layer.expert_bytes / (gbps * 1e9)
    compute_s = tokens * layer.token_flops / (gflops * 1e9) if gflops else 0.0
    return max(read_s, compute_s) * (1 if neurons is None else neurons / layer.neurons)


def seconds_per_gb(points: tuple[tuple[int, float], ...], tokens: float) -> float:
    """Seconds of 1e9 bytes of weights between measured points, and beyond the last as between the last two."""
    if len(points) == 1 or tokens <= points[0][0]:
        return 1 / points[0][1]
    after = next((i for i, (count, _) in enumerate(points) if i and count >= tokens), len(points) - 1)
    (low, low_gbps), (high, high_gbps) = points[after - 1], points[after]
    slope = (1 / high_gbps - 1 / low_gbps) / (high - low)
    return 1 / low_gbps + max(0.0, slope) * (tokens - low)
