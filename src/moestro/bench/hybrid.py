"""Time all policies on this machine's GPU, one after another, with one load of random weights of a real shape.

    moestro bench hybrid --shape mixtral-8x7b --gpu-memory 24GiB

The rates behind the limits are measured in the same run: how fast the CPU reads the store and the link copies from it,
both at once. Let r = CPU rate / link rate and h be the hit rate of the fastest policy. Arithmetic then allows that
policy to be faster by these factors:

- than layer streaming, (experts / top-k) (1 + r) / (1 - h);
- than an LRU that copies every miss, 1 + r;
- than choosing for each whole expert between CPU and copy, 1 + 1 / r.

On the emulated device a run only shows that everything works: its figures say nothing about a GPU.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..compute.cpu import read_gbps
from ..console import print_table
from ..engine.conductor import Conductor
from ..loading.build import conduct_by
from ..loading.config import MoestroConfig
from ..loading.plug import MoestroQuantizer  # noqa: F401  # registers the experts function
from ..loading.random_model import build_random_model, set_routing, shape_tokenizer
from ..machine.measure import this_machine
from ..planning.budget import format_bytes
from ..planning.contract import Costs, Expert
from ..planning.policies import make_policy
from ..text.generation import TextResult, generate_text
from ..text.options import TextOptions
from ..text.tracing import listening
from .limit import HybridLimit
from .report import Report, check_kernels

POLICIES = (  # those that the ratios need come first, since the time limit may end the list early
    "moestro",
    "layer-streaming",
    "lru",
    "fiddler",
    "bandwidth-split",
    "lru-speculative",
    "cpu-only",
)
PROMPTS = (32, 512, 2048)
# Speedups in Fiddler's first preprint on its two machines, over DeepSpeed-MII and over mixtral-offloading.
PUBLISHED = {"layer-streaming": "19.4 and 22.5", "lru": "8.2 and 10.1"}
_TOGETHER_BYTES = 4 * 2**30
_READ_BYTES = 64 * 2**20
PROFILE_PROMPT, _PROMPT = 64, 32  # tokens before the answers that place experts, and before those that are timed
_MOST_QUEUED = 100  # most copies to queue at once, which bounds their number where experts are tiny
_LIMIT_TOKENS = 16  # the hybrid limit is computed from the hits of so many tokens


@dataclass(frozen=True, slots=True)
class HybridRow:
    """One policy on one link and routing.

    decoded: tokens; fewer than asked for where the policy's time was over. share: of the hybrid limit at its hits.
    host_us: microseconds of host work in a layer step besides computing and waiting; None where no captured step was
    replayed.
    """

    policy: str
    link_gbps: float | None  # the pace; None for the link's own speed
    routing: str
    prefill_tok_s: dict[int, float]
    decode_tok_s: float
    decoded: int
    hit_rate: float
    bytes_moved: int
    share: float
    link_busy_s: float  # of the timed answer, its prompt of 32 tokens included
    link_idle_s: float  # while a copy could go
    host_us: float | None
    slots: int
    peak_gpu_bytes: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast the best policy decodes as another one, and what arithmetic allows."""

    over: str
    link_gbps: float | None
    routing: str
    best: str
    ratio: float
    allowed: float
    published: str | None


@dataclass(frozen=True, slots=True)
class HybridReport(Report):
    """One run. rates: (pace of the link in GB/s or None, CPU GB/s, link GB/s), the last two measured at once."""

    shape: str
    layers: int
    bits: int
    device: str
    gpu_bytes: int
    rates: tuple[tuple[float | None, float, float], ...]
    rows: tuple[HybridRow, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[str, ...]  # policies that there was no time for

    def print(self) -> None:
        """Print the rates, a row for each policy and the ratios."""
        print(f"{self.shape}, {self.layers} layers, {self.bits} bits; {format_bytes(self.gpu_bytes)} of {self.device}")
        for pace, cpu, link in self.rates:
            print(f"{_link_name(pace)}: CPU {cpu:.1f} GB/s and link {link:.1f} GB/s at once")
        prompts = list(self.rows[0].prefill_tok_s) if self.rows else []
        names = ("policy", "link", "routing", *(f"prefill {n}" for n in prompts), "decode", "tokens", "hits", "moved")
        rows = []
        for row in self.rows:
            prefill = [f"{row.prefill_tok_s[n]:.1f}" if n in row.prefill_tok_s else "-" for n in prompts]
            figures = [f"{row.decode_tok_s:.2f}", str(row.decoded), f"{row.hit_rate:.1%}"]
            figures += [format_bytes(row.bytes_moved), f"{row.share:.2f}"]
            host_us = "-" if row.host_us is None else f"{row.host_us:.0f}"
            rows.append((row.policy, _link_name(row.link_gbps), row.routing, *prefill, *figures, host_us))
        print_table((*names, "share", "host us"), rows)
        for name in self.skipped:
            print(f"no time for {name}")
        for ratio in self.ratios:
            beside = f"; published {ratio.published}" if ratio.published else ""
            print(
                f"{ratio.best} over {ratio.over}, {_link_name(ratio.link_gbps)}, {ratio.routing} routing: "
                f"{ratio.ratio:.2f} x, {ratio.ratio / ratio.allowed:.2f} of the {ratio.allowed:.2f} x that arithmetic "
                f"allows{beside}"
            )


def _link_name(gbps: float | None) -> str:
    return "full link" if gbps is None else f"{gbps:g} GB/s"


def measure_hybrid(
    shape: str,
    *,
    device: str = "auto",
    gpu_memory: str | int,
    bits: int | None = None,
    layers: int | None = None,
    links: Sequence[float | None] = (None,),
    names: Sequence[str] = POLICIES,
    prompts: Sequence[int] = PROMPTS,
    decode_tokens: int = 64,
    seconds: float = 8.0,
    uniform: bool = True,
    threads: int | None = None,
    limit_s: float = float("inf"),
) -> HybridReport:
    """Load a shape once and run policies on it.

    Args:
        gpu_memory: the most GPU memory to use, in bytes or like "24GiB".
        bits: of all weights; None for 16.
        layers: the depth to cut the model to; None for all layers.
        links: paces of the link in GB/s; None for its own speed.
        names: of the policies.
        prompts: lengths of the timed prompts in tokens.
        seconds: when they have passed, a policy's decode ends with the tokens it has made.
        uniform: also measure decode with routers that choose all experts alike, at the first of the links.
        limit_s: seconds after loading from which no further policy is begun; the report names the skipped ones.

    Raises:
        RequestError: no accelerator, no kernels, or no such policy. BudgetError: it does not fit.
    """
    check_kernels()
    context = max(PROFILE_PROMPT, *prompts) + decode_tokens
    config = MoestroConfig(
        device=device, gpu_memory=gpu_memory, context=context, bits=bits, policy="cpu-only", threads=threads
    )
    model = build_random_model(shape, config, dtype="auto", seed=0, layers=layers)
    gpu_bytes = config.budget.gpu_bytes or 0
    end_s = time.perf_counter() + limit_s
    bench = _Bench(model, shape_tokenizer(shape), names, prompts, decode_tokens, seconds, end_s)
    accelerator = bench.conductor.device.accelerator
    assert accelerator is not None
    accelerator.pin(bench.conductor.store.memory)
    for routing, paces in (("skewed", links), ("uniform", links[:1] if uniform else ())):
        set_routing(model, skewed=routing == "skewed")
        bench.measure(routing, paces)
    conductor = bench.conductor
    matrix = conductor.math[0].format.matrices["down"]
    report = HybridReport(
        shape=shape,
        layers=len(conductor.spec.layers),
        bits=round(8 * matrix.panel_bytes(64) / (64 * 16)),
        device=conductor.device.card_name,
        gpu_bytes=gpu_bytes,
        rates=tuple((pace, *together) for pace, together in bench.rates.items()),
        rows=tuple(bench.rows),
        ratios=tuple(_ratios(bench.rows, bench.rates, conductor.spec.layers[0].experts / bench.top_k)),
        skipped=tuple(bench.skipped),
    )
    conductor.close()
    return report


def rates_together(conductor: Conductor, seconds: float = 2.0) -> tuple[float, float]:
    """GB/s at which the CPU reads the store and GB/s at which the link copies from it, both at once for `seconds`."""
    assert conductor.device.accelerator is not None
    store, lane, threads = conductor.store, conductor.device.accelerator.link, conductor.cpu.threads
    size = min(_TOGETHER_BYTES, store.n_bytes) // 64 * 64
    parts = store.memory[:size].view(torch.float32).split(_READ_BYTES // 4)
    experts = [(layer, e) for layer, of in enumerate(conductor.spec.layers) for e in range(of.experts)]
    target = conductor.device.pool(1, conductor.spec.slot_bytes)[0]
    following = itertools.cycle(experts)

    def feed() -> None:
        for _ in range(_MOST_QUEUED):
            if lane.queued_bytes() >= 4 * _READ_BYTES:
                return
            source = store[expert := next(following)]
            lane.submit(source, target[: source.numel()], False, expert)

    idle_bytes = lane.counters.n_bytes
    feed()
    while lane.counters.n_bytes == idle_bytes and lane.queued_bytes():  # until the link is at work
        time.sleep(0.001)
    begun_bytes, start_s, read_s, read_bytes, turn = lane.counters.n_bytes, time.perf_counter(), 0.0, 0, 0
    while (now_s := time.perf_counter()) < start_s + seconds:
        part = parts[turn % len(parts)]
        read_s += part.numel() * 4 / read_gbps(part, threads, 512) / 1e9
        read_bytes, turn = read_bytes + part.numel() * 4, turn + 1
        feed()
    link_gbps = (lane.counters.n_bytes - begun_bytes) / (now_s - start_s) / 1e9
    lane.settle()
    return read_bytes / read_s / 1e9, link_gbps


class _Bench:
    """A loaded model and the rows measured so far. The arguments are those of `measure_hybrid`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: Sequence[str],
        prompts: Sequence[int],
        decode_tokens: int,
        seconds: float,
        end_s: float,
    ) -> None:
        self._model, self._tokenizer, self._names, self._prompts = model, tokenizer, names, prompts
        self._decode_tokens, self._seconds, self._end_s = decode_tokens, seconds, end_s
        plan = self.conductor.gpu_plan
        self._room_bytes = 0 if plan is None else plan.left_bytes
        config = model.config.get_text_config()
        self._vocabulary, self.top_k = config.vocab_size, config.num_experts_per_tok
        self.rates: dict[float | None, tuple[float, float]] = {}  # of each pace, CPU and link at once
        self.rows: list[HybridRow] = []
        self.skipped: list[str] = []

    @property
    def conductor(self) -> Conductor:
        """The model's present conductor, which has the policy that was measured last."""
        found: Conductor = self._model.moestro
        return found

    def measure(self, routing: str, paces: Sequence[float | None]) -> None:
        """Measure all policies at each pace of the link: all prompts at the first pace, one prompt at the others."""
        heat = self._profile()
        for pace_index, pace in enumerate(paces):
            assert self.conductor.device.accelerator is not None
            lane = self.conductor.device.accelerator.link
            lane.gbps = pace
            if pace not in self.rates:
                self.rates[pace] = rates_together(self.conductor)
            for name in self._names:
                if time.perf_counter() > self._end_s:
                    self.skipped.append(f"{name}, {_link_name(pace)}, {routing} routing")
                    continue
                self.rows.append(self._run(name, routing, heat, self.rates[pace], pace_index))

    def _profile(self) -> dict[Expert, float]:
        """How often each expert is used in an answer to a prompt that is not timed."""
        conduct_by(self._model, make_policy("cpu-only"), 0, {}, Costs())
        with listening(self._model, 0) as listener:
            self._generate(PROFILE_PROMPT, self._decode_tokens, seed=1)
        return dict(listener.trace(self._model, "profile", None).heat())

    def _generate(self, prompt: int, new_tokens: int, seed: int) -> TextResult:
        ids = torch.randint(self._vocabulary, (prompt,), generator=torch.Generator().manual_seed(seed))
        end_s = time.perf_counter() + self._seconds
        options = TextOptions(max_new_tokens=new_tokens, temperature=1.0, top_p=1.0, top_k=0)  # greedy ones repeat
        return generate_text(
            self._model, self._tokenizer, ids, options, should_stop=lambda: time.perf_counter() > end_s
        )

    @cached_property
    def _measured(self) -> Costs:
        return this_machine(self.conductor.device, self.conductor.cpu.threads).costs

    def _run(
        self, name: str, routing: str, heat: dict[Expert, float], together: tuple[float, float], pace_index: int
    ) -> HybridRow:
        costs = replace(self._measured, cpu_beside_link_gbps=together[0], link_gbps=together[1])
        conductor = conduct_by(self._model, make_policy(name), self._room_bytes, heat, costs)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        conductor.listener = limit = HybridLimit(conductor.spec, replace(costs, cpu_gbps=together[0]))
        limited = self._generate(_PROMPT, min(_LIMIT_TOKENS, self._decode_tokens), seed=2)  # also allocates buffers
        conductor.listener = None  # a listener slows each layer, so the timed run has none
        self._generate(_PROMPT, 4, seed=2)  # captures the steps that are replayed
        prompts = [] if routing != "skewed" else self._prompts if pace_index == 0 else self._prompts[:1]
        if not self.rows:
            for n in prompts:  # compiles the kernels for these prompts
                self._generate(n, 1, seed=2)
        prefill = {n: self._generate(n, 1, seed=3).prefill_tok_s for n in prompts}
        assert conductor.device.accelerator is not None
        lane = conductor.device.accelerator.link
        busy_s, idle_s = lane.counters.busy_s, lane.counters.idle_s
        found = self._generate(_PROMPT, self._decode_tokens, seed=4)
        decoded, decode_tok_s = found.new_tokens - 1, found.decode_tok_s or 0.0
        return HybridRow(
            policy=name,
            link_gbps=lane.gbps,
            routing=routing,
            prefill_tok_s=prefill,
            decode_tok_s=decode_tok_s,
            decoded=decoded,
            hit_rate=found.hit_rate or 0.0,
            bytes_moved=found.bytes_moved,
            share=limit.seconds * decode_tok_s / max(1, limited.new_tokens - 1),
            link_busy_s=lane.counters.busy_s - busy_s,
            link_idle_s=lane.counters.idle_s - idle_s,
            host_us=found.capture.host_us if found.capture is not None and found.capture.cuts else None,
            slots=len(conductor.slots),
            peak_gpu_bytes=conductor.device.peak_bytes(),
        )


def _ratios(rows: Sequence[HybridRow], rates: Mapping[float | None, tuple[float, float]], spread: float) -> list[Ratio]:
    """Compare the fastest policy with three others, for each pace of the link and routing.

    Args:
        rows: all that was measured.
        rates: of each pace, GB/s of the CPU and of the link at once.
        spread: experts of a layer over experts of a token.
    """
    found = []
    for pace, routing in dict.fromkeys((row.link_gbps, row.routing) for row in rows):
        group = {row.policy: row for row in rows if (row.link_gbps, row.routing) == (pace, routing)}
        best = max(group.values(), key=lambda row: row.decode_tok_s)
        cpu_gbps, link_gbps = rates[pace]
        r, hits = cpu_gbps / link_gbps, best.hit_rate
        allowed = {"layer-streaming": spread * (1 + r) / max(1e-9, 1 - hits), "lru": 1 + r, "fiddler": 1 + 1 / r}
        for over, most in allowed.items():
            if over in group and group[over].decode_tok_s:
                ratio = best.decode_tok_s / group[over].decode_tok_s
                found.append(Ratio(over, pace, routing, best.policy, ratio, most, PUBLISHED.get(over)))
    return found
