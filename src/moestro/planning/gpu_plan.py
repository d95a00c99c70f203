"""How the memory of a GPU is shared out between dense weights, caches and activations, and experts.

share_out(2**33, Margin(0.02, 2**26), 4096, plan_for, named=True).left_bytes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import BudgetError, RequestError
from .budget import LEAST_CONTEXT, Margin, format_bytes, round_up
from .spelling import spelled

_WORTH_OFFERING = 16  # tokens: no shorter context is proposed


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """How the GPU's budget is shared out: weights outside the experts, sequences of `context` tokens, experts.

    kv_bytes: the full caches of all of them. activation_bytes: the most at once beside it. margin_bytes: kept back.
    experts, expert_bytes: the slots. measured: False where cache and activations are estimated. chunk: of how many
    tokens a prompt is read at a time; None for all.
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
    chunk: int | None = None
    sequences: int = 1

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
        if needed > self.context * self.sequences:
            several = f"{sequences} sequences of " if sequences > 1 else ""
            remedy = spelled("sequences", sequences) if sequences > self.sequences else spelled("context", needed)
            raise RequestError(
                f"{several}{prompt_tokens} tokens of prompt and {new_tokens} new ones are {needed}, but GPU memory was "
                f"planned for {self._tokens()}; ask for fewer ({spelled('max_new_tokens')}) or start with {remedy}"
            )

    def _tokens(self) -> str:
        return f"{self.sequences} x {self.context}" if self.sequences > 1 else f"{self.context}"

    def _needs(self) -> str:
        estimated = "" if self.measured else " (estimated)"
        chunks = "" if self.chunk is None else f" for {self.chunk} at a time"
        margin = f", margin {format_bytes(self.margin_bytes)}" if self.margin_bytes else ""
        return (
            f"dense weights {format_bytes(self.dense_bytes)}, KV cache {format_bytes(self.kv_bytes)} for "
            f"{self._tokens()} tokens, activations {format_bytes(self.activation_bytes)}{chunks}{estimated}{margin}"
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
    limit = f"{spelled('gpu_memory')} allows" if named else "there are free"
    remedy = f"give it at least {round_up(least_bytes)}" if named else "free some"
    shorter = _longest_that_fits(plan, plan_for)
    if shorter and not context_named:
        return share_out(budget_bytes, margin, shorter, plan_for, named=named)
    raise BudgetError(
        f"the GPU needs {format_bytes(plan.needed_bytes + plan.margin_bytes)} ({plan._needs()}), but {limit} "
        f"{format_bytes(budget_bytes)}; {remedy}" + (f" or ask for {spelled('context', shorter)}" if shorter else "")
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
