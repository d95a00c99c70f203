"""Amounts of memory as people write them, and whether a model fits in them.

    Budget.parse(gpu_memory="12GiB", ram="48GiB")

Sizes are ints in bytes everywhere inside; GiB = 2**30, GB = 10**9. Knows nothing of the machine: what
it has is passed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import BudgetError, RequestError
from .contract import ModelSpec, Placement

LEAST_CONTEXT = 2  # a token of a prompt and one of an answer
_WORTH_OFFERING = 16

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str | int, option: str = "size") -> int:
    """Bytes of "12GiB", "500MB", "0.5 GiB" or a plain number of bytes.

    Raises:
        RequestError: when the text is no amount of memory.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise RequestError(f"{option} {text!r} is no amount of memory; write it like 12GiB, 500MB or 1073741824")
    return int(float(match[1]) * units[match[2].lower()])


def parse_gbps(text: str | float, option: str = "rate") -> float:
    """GB/s (1e9 bytes a second) of "12GB/s" or a plain number of them.

    Raises:
        RequestError: when the text is no rate.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB/s)?\s*", str(text), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise RequestError(f"{option} {text!r} is no rate; write it like 12GB/s")
    return float(match[1])


def format_bytes(n_bytes: float) -> str:
    """Bytes for people: "1.5 GiB", "22.9 MiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} B"


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory that Moestro may use, in bytes; None means all that the machine has to give."""

    gpu_bytes: int | None = None
    ram_bytes: int | None = None

    @classmethod
    def parse(cls, *, gpu_memory: str | int | None = None, ram: str | int | None = None) -> Budget:
        """Read the two amounts that a user names."""
        return cls(
            gpu_bytes=None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory"),
            ram_bytes=None if ram is None else parse_bytes(ram, "--ram"),
        )


class Margin(NamedTuple):
    """What a budget keeps back for what nobody measures: a share of it and so many bytes."""

    share: float
    fixed_bytes: int

    def of(self, budget_bytes: int) -> int:
        """Bytes that are kept back."""
        return int(self.share * budget_bytes) + self.fixed_bytes


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """How the GPU's budget is shared out: weights outside the experts, one sequence of `context` tokens, experts.

    kv_bytes: the full cache. activation_bytes: the most at once beside it. margin_bytes: kept back. experts,
    expert_bytes: the slots. measured: False where cache and activations are estimated.
    """

    budget_bytes: int
    dense_bytes: int
    context: int
    kv_bytes: int
    activation_bytes: int
    margin_bytes: int = 0
    experts: int = 0
    expert_bytes: int = 0
    measured: bool = True

    @property
    def needed_bytes(self) -> int:
        """All but experts and margin."""
        return self.dense_bytes + self.kv_bytes + self.activation_bytes

    @property
    def left_bytes(self) -> int:
        """What nothing has; below 0 where it does not fit."""
        return self.budget_bytes - self.margin_bytes - self.needed_bytes - self.expert_bytes

    def in_words(self) -> str:
        """The plan in one line."""
        return (
            f"GPU {format_bytes(self.budget_bytes)}: {self._needs()}, {self.experts} experts "
            f"{format_bytes(self.expert_bytes)}, {format_bytes(self.left_bytes)} left"
        )

    def check_tokens(self, prompt_tokens: int, new_tokens: int, sequences: int = 1) -> None:
        """Refuse a request that is longer than what was planned for.

        Raises:
            RequestError: with the option that plans for more.
        """
        needed = (prompt_tokens + new_tokens) * sequences
        if needed > self.context:
            beams = f"{sequences} beams of " if sequences > 1 else ""
            raise RequestError(
                f"{beams}{prompt_tokens} tokens of prompt and {new_tokens} new ones are {needed}, but GPU memory was "
                f"planned for {self.context}; ask for fewer (--max-new-tokens) or start with --context {needed}"
            )

    def _needs(self) -> str:
        estimated = "" if self.measured else " (estimated)"
        margin = f", margin {format_bytes(self.margin_bytes)}" if self.margin_bytes else ""
        return (
            f"dense weights {format_bytes(self.dense_bytes)}, KV cache {format_bytes(self.kv_bytes)} for "
            f"{self.context} tokens, activations {format_bytes(self.activation_bytes)}{estimated}{margin}"
        )


def share_out(
    budget_bytes: int,
    margin: Margin,
    context: int,
    plan_for: Callable[[int], GpuPlan],
    *,
    named: bool,
    context_named: bool = True,
) -> GpuPlan:
    """A plan with room for so many tokens; what it leaves is the experts'.

    Args:
        plan_for: what a context needs, without a margin.
        named: whether the user named the budget (the message says where the limit comes from).
        context_named: whether the user named the context; else a shorter one that fits is taken instead.

    Raises:
        BudgetError: it does not fit, with all numbers, the least budget, and the longest context that would.
    """
    plan = replace(plan_for(context), budget_bytes=budget_bytes, margin_bytes=margin.of(budget_bytes))
    if plan.left_bytes >= 0:
        return plan
    least_bytes = int((plan.needed_bytes + margin.fixed_bytes) / (1 - margin.share)) + 1
    limit = "--gpu-memory allows" if named else "there are free"
    remedy = f"give it at least {_round_up(least_bytes)}" if named else "free some"
    shorter = _longest_that_fits(plan, plan_for)
    if shorter and not context_named:
        return share_out(budget_bytes, margin, shorter, plan_for, named=named)
    raise BudgetError(
        f"the GPU needs {format_bytes(plan.needed_bytes + plan.margin_bytes)} ({plan._needs()}), but {limit} "
        f"{format_bytes(budget_bytes)}; {remedy}" + (f" or ask for --context {shorter}" if shorter else "")
    )


def _longest_that_fits(too_long: GpuPlan, plan_for: Callable[[int], GpuPlan]) -> int | None:
    """A context that fits, found by a few lines between one that does and one that does not; None if all are short."""
    room_bytes = too_long.budget_bytes - too_long.margin_bytes
    fits, fails, fails_bytes = LEAST_CONTEXT, too_long.context, too_long.needed_bytes
    fits_bytes = plan_for(fits).needed_bytes
    for _ in range(3):
        if fits_bytes > room_bytes or fits_bytes >= fails_bytes:
            break
        between = fits + (room_bytes - fits_bytes) * (fails - fits) // (fails_bytes - fits_bytes)
        needed_bytes = plan_for(between).needed_bytes
        if needed_bytes <= room_bytes:
            fits, fits_bytes = between, needed_bytes
        else:
            fails, fails_bytes = between, needed_bytes
    return fits if fits >= _WORTH_OFFERING else None


def check_fits(
    spec: ModelSpec, placement: Placement, *, gpu_bytes: int, ram_bytes: int, dense_on_gpu: bool, ram_named: bool
) -> None:
    """Refuse a model that does not fit, with the numbers and what would fit.

    Args:
        gpu_bytes, ram_bytes: the budget, or what is free where the user named none.
        ram_named: whether the user named the RAM (the message says where the limit comes from).

    Raises:
        BudgetError: one line with what is needed, what there is and what to ask for.
    """
    held_bytes = sum(spec.layers[layer].expert_bytes for layer, _ in placement.held)
    pool_bytes = (len(placement.held) + placement.slots) * spec.slot_bytes
    gpu_needed = pool_bytes + (spec.dense_bytes if dense_on_gpu else 0)
    if gpu_needed > gpu_bytes:
        raise BudgetError(
            f"the GPU needs {format_bytes(gpu_needed)} (dense weights {format_bytes(spec.dense_bytes)}), but "
            f"--gpu-memory allows {format_bytes(gpu_bytes)}; give it at least {_round_up(gpu_needed)}"
        )
    experts_in_ram = spec.expert_bytes - held_bytes
    ram_needed = experts_in_ram + (0 if dense_on_gpu else spec.dense_bytes)
    if ram_needed > ram_bytes:
        limit = "--ram allows" if ram_named else "this machine has free"
        remedy = (
            f"give --ram at least {_round_up(ram_needed)}" if ram_named else "free memory or choose a smaller model"
        )
        raise BudgetError(
            f"the model needs {format_bytes(ram_needed)} of RAM (experts {format_bytes(experts_in_ram)}), but "
            f"{limit} {format_bytes(ram_bytes)}; {remedy}"
        )


def _round_up(n_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{-(-n_bytes * 10 // size) / 10:g}{unit}"
    return f"{n_bytes}B"
