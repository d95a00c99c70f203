"""Measure Figure 2 of Eliseev and Mazur (arXiv 2312.17238): LRU hits by slots a layer, recall by experts guessed.

    moestro bench recall demo --text data/stories/heldout.txt --plot docs/recall.svg

Guesses are taken 1, 2 and 10 layers ahead, or as far as the model's depth allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..console import print_table
from ..simulate.trace import Trace
from ..simulate.trace_summary import lru_hit_rate, recall
from .plots import plotting
from .report import Report

FARTHEST = 10  # layers ahead, as in the paper


@dataclass(frozen=True, slots=True)
class RecallReport(Report):
    """One run.

    hits: hit ratio of an LRU by k, its slots a layer. recall: by layers ahead, then by how many experts are guessed,
    the share of the experts used that were guessed.
    """

    model: str
    experts: int
    top_k: int
    decode_tokens: int
    text_sha256: str | None
    hits: dict[int, float]
    recall: dict[int, dict[int, float]]

    def print(self) -> None:
        """Print hits and recall as two tables."""
        print(f"{self.model}: LRU hit ratio, k of {self.experts} experts a layer")
        hits = [(str(k), f"{rate:.3f}", f"{k / self.experts:.3f}") for k, rate in self.hits.items()]
        print_table(("k", "LRU", "random"), hits)
        print(f"recall of the next gates' guesses, top-{self.top_k} of {self.experts}")
        counts = next(iter(self.recall.values()), {})
        found = [(str(n), *(f"{rates[n]:.3f}" for rates in self.recall.values())) for n in counts]
        print_table(("guessed", *(f"{ahead} ahead" for ahead in self.recall)), found)
        print(f"{self.decode_tokens} decoded tokens")

    def plot(self, path: Path) -> None:
        """Draw hits and recall as an SVG.

        Raises:
            RequestError: matplotlib is not installed.
        """
        pyplot = plotting()
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
        left.plot(list(self.hits), list(self.hits.values()), "o-", label="LRU")
        left.plot(list(self.hits), [k / self.experts for k in self.hits], ":", color="grey", label="random")
        left.set(xlabel="slots a layer, k", ylabel="hit ratio", ylim=(0, 1.02))
        for (ahead, rates), style in zip(self.recall.items(), ("o-", "o--", "o:"), strict=False):
            right.plot(list(rates), list(rates.values()), style, label=f"{ahead} ahead")
        right.set(xlabel="experts guessed", ylabel="recall")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(f"{self.model}, top-{self.top_k} of {self.experts} experts, {self.decode_tokens} tokens")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})


def measure_recall(trace: Trace) -> RecallReport:
    """Find an LRU's hits in a trace, and the recall of the guesses that it holds."""
    lookahead = sorted({1, 2, min(trace.lookahead, FARTHEST, len(trace.spec.layers) - 1)})
    experts = max(layer.experts for layer in trace.spec.layers)
    kept = max((len(g) for step in trace.passes[-1].steps for g in step.guesses.values()), default=0)
    counts = range(1, min(experts, kept) + 1)
    found = {ahead: {count: recall(trace, ahead, count) for count in counts} for ahead in lookahead}
    ks = [k for k in range(1, experts + 1) if k <= 8 or k % (experts // 8) == 0]
    return RecallReport(
        model=trace.model,
        experts=experts,
        top_k=trace.top_k,
        decode_tokens=sum(one.tokens for one in trace.passes if one.phase.value == "decode"),
        text_sha256=trace.text_sha256,
        hits={k: lru_hit_rate(trace, k) for k in ks},
        recall={
            ahead: {count: rate for count, rate in rates.items() if rate is not None}
            for ahead, rates in found.items()
            if any(rate is not None for rate in rates.values())
        },
    )
