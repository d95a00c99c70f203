"""The short card of a conductor that `print(model.moestro)` shows: what runs where, in how many bytes, by which policy.

Knows what a conductor has; reads no counter, since that may wait for a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..compute.cpu import best_level
from ..planning.budget import format_bytes


class HasCard:
    """The base of a conductor, which prints itself as a card."""

    def __repr__(self) -> str:
        return "\n".join(f"{name:<9}{text}" for name, text in _lines(self).items())


def _lines(of: Any) -> dict[str, str]:
    spec, slots, plan = of.spec, of.slots, of.gpu_plan
    formats = Counter(math.format.name for math in of.math)
    sizes = sorted({layer.experts for layer in spec.layers})
    compiled = sum(of.cpu.kernel(math) is not None for math in of.math)
    by = f"kernels at level {best_level()}" if compiled else "plain torch"
    if 0 < compiled < len(of.math):
        by += f" in {compiled} of {len(of.math)} layers, plain torch in the others"
    lines = {
        "model": f"{len(spec.layers)} MoE layers of {' or '.join(map(str, sizes))} experts",
        "experts": f"{format_bytes(spec.expert_bytes)} in {', '.join(name for name, _ in formats.most_common())}",
        "RAM": f"{len(of.store.experts)} experts, {format_bytes(of.store.n_bytes)}",
    }
    if of.device.accelerator is None:
        lines["GPU"] = "none: all runs on the CPU"
    else:
        room = f"{len(slots)} slots of {format_bytes(spec.slot_bytes)}" if slots else "no slots"
        lines["GPU"] = f"{of.device.name}, {room}, {len(slots.held)} experts held for good"
    if plan is not None:
        lines["GPU plan"] = plan.in_words().removeprefix("GPU ")
    where = "on the GPU" if of.device.dense_on_gpu else "in RAM"
    lines["the rest"] = f"{format_bytes(spec.dense_bytes)} {where}: attention, norms, embeddings, head"
    lines["CPU"] = f"{of.cpu.threads} threads, {by}"
    lines["policy"] = of.policy.name
    if of.time.is_virtual:
        lines["clock"] = "virtual: a modelled machine's time"
    return lines
