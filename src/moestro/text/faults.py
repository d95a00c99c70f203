"""Major page faults of a generation: pages that came from swap or from a file while the work waited.

    >>> PageFaults(prefill=0, decode=4000, steps=9, decode_s=2.0).decode_share
    0.2

Knows no model. Needs the standard library alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..planning.spelling import spelled

READ_S = 1e-4  # of a page from a fast disk; others take longer
_NOTED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class PageFaults:
    """What this process waited for.

    prefill, decode: faults until the first token and after it. steps: in all. decode_s: seconds after the first.
    """

    prefill: int
    decode: int
    steps: int
    decode_s: float

    @property
    def a_step(self) -> float:
        """Faults of a step of decode."""
        return self.decode / max(1, self.steps - 1)

    @property
    def decode_share(self) -> float:
        """At least so much of decode's time went into them; 0 where there was no decode."""
        return min(1.0, self.decode * READ_S / self.decode_s) if self.decode_s > 0 else 0.0

    def describe(self) -> str:
        """The figures in words."""
        of_answer = f"{self.decode} while answering, {self.a_step:.1f} for each token"
        return f"{self.prefill} pages of memory fetched from disk while reading the prompt, {of_answer}"

    def warning(self) -> str | None:
        """A line to warn with where the faults slow decode; else None."""
        if self.decode_share < _NOTED_SHARE:
            return None
        return (
            f"the answer waited for the disk: {self.a_step:.0f} pages for each token, at least "
            f"{self.decode_share:.0%} of "
            "its time; weights and cache do not stay in RAM: close other programs, or take fewer "
            f"{spelled('bits')}"
        )

    def to_json(self) -> dict[str, int]:
        """The counts as `--json` prints them."""
        return {name: count for name, count in asdict(self).items() if name in ("prefill", "decode")}
