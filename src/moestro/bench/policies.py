"""All policies on one model's routing: by replay on any machine, or live.

    moestro bench policies demo --text story.txt --machine rtx4090 --as-shape mixtral-8x7b

One trace is recorded and cut in two: policies that place by popularity get the first half as their profile, and all are
run on the second, so nobody is judged by what it was told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..errors import RequestError
from ..generation import encode
from ..loading import load, load_tokenizer
from ..planning.budget import format_bytes, parse_bytes
from ..planning.contract import Phase
from ..planning.policies import make_policy
from ..planning.replay import replay
from ..planning.tile import resized
from ..planning.trace import Trace
from ..tracing import LOOKAHEAD, read_pieces, trace_ids
from .traces import find_machine, read_text


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy's figures. share: of the hybrid limit of decode at its own hit rate; the last three only by replay."""

    policy: str
    prefill_tok_s: float
    decode_tok_s: float
    hit_rate: float
    bytes_moved: int
    share: float | None
    slots: int
    own_share: float | None = None
    prefill_own_share: float | None = None
    belady_hit_rate: float | None = None
    belady_share: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class PoliciesReport:
    """One run; `where` says what was run on what."""

    where: str
    rows: tuple[PolicyRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"where": self.where, "rows": [row.to_json() for row in self.rows]}

    def print(self) -> None:
        """One row a policy, the slow ones too."""
        table = Table()
        for name in ("policy", "prefill tok/s", "decode tok/s", "hits", "moved", "slots", "share", "own", "Belady"):
            table.add_column(name, justify="left" if name == "policy" else "right")
        for row in self.rows:
            table.add_row(
                row.policy,
                f"{row.prefill_tok_s:.1f}",
                f"{row.decode_tok_s:.2f}",
                f"{row.hit_rate:.1%}",
                format_bytes(row.bytes_moved),
                str(row.slots),
                *(("-" if share is None else f"{share:.2f}") for share in (row.share, row.own_share, row.belady_share)),
            )
        console = Console(width=110)
        console.print(self.where)
        console.print(table)
        console.print(
            "share: of the hybrid limit of decode at the policy's own hit rate; own: of what the method's arithmetic\n"
            "allows; Belady: of the hybrid limit at the best hit rate that so many slots can have"
        )


def compare(trace: Trace, machine: str, gpu_bytes: int | None, names: Sequence[str]) -> list[PolicyRow]:
    """Replay policies on the second half of a trace, with the first as their profile."""
    middle = len(trace.passes) // 2
    heat = replace(trace, passes=trace.passes[:middle]).heat()
    rest = replace(trace, passes=trace.passes[middle:])
    if not any(one.phase is Phase.PREFILL for one in rest.passes):
        raise RequestError("the second half of the trace has no prompt; record more --tokens, or fewer --decode-tokens")
    found_machine = find_machine(machine)
    rows = []
    for name in names:
        found = replay(rest, make_policy(name), found_machine, gpu_bytes=gpu_bytes, heat=heat)
        rows.append(
            PolicyRow(
                policy=name,
                prefill_tok_s=found.prefill.tok_s,
                decode_tok_s=found.decode.tok_s,
                hit_rate=found.decode.hit_rate,
                bytes_moved=found.moved_bytes,
                share=found.decode.share,
                slots=found.slots,
                own_share=found.decode.own_share,
                prefill_own_share=found.prefill.own_share,
                belady_hit_rate=found.belady_rate,
                belady_share=found.belady_share,
            )
        )
    return rows


def compare_policies(
    model: str | None,
    shape: str | None,
    text: str | None,
    trace_path: str | None,
    *,
    machine: str,
    gpu_memory: str | None,
    as_shape: str | None,
    bits: int | None,
    names: Sequence[str],
    live: bool,
    tokens: int,
    prompt_tokens: int,
    decode_tokens: int,
    seed: int,
) -> PoliciesReport:
    """What `moestro bench policies` is asked for; all of them as its options are."""
    for name in names:
        make_policy(name)  # refused before the work
    gpu_bytes = None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory")
    if live:
        if trace_path is not None or as_shape is not None:
            raise RequestError("--live runs the model itself; leave --trace and --as-shape out")
        return _compare_live(
            model,
            shape,
            text,
            machine=machine,
            gpu_memory=gpu_memory,
            bits=bits,
            names=names,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            seed=seed,
        )
    if trace_path is not None:
        if model is not None or shape is not None or text is not None:
            raise RequestError("--trace has its own model and text; leave MODEL, --shape and --text out")
        trace = Trace.load(Path(trace_path))
    else:
        trace = record(
            model, shape, text, tokens=tokens, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, seed=seed
        )
    trace = resized(trace, as_shape, bits)
    rows = compare(trace, machine, gpu_bytes, names)
    return PoliciesReport(f"replay of {trace.model} on {machine}", tuple(rows))


def record(
    model: str | None,
    shape: str | None,
    text: str | None,
    *,
    tokens: int,
    prompt_tokens: int,
    decode_tokens: int,
    seed: int,
    lookahead: int = LOOKAHEAD,
) -> Trace:
    """A trace of a model on the CPU, on a text file or on random tokens."""
    loaded = load(model, shape=shape, seed=seed, device="cpu")
    ids, words = _ids(model, shape, text, loaded, tokens, prompt_tokens, decode_tokens, seed)
    return trace_ids(
        loaded,
        model or shape or "",
        ids,
        words,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        lookahead=lookahead,
    )


def _ids(
    model: str | None,
    shape: str | None,
    text: str | None,
    loaded: Any,
    tokens: int,
    prompt_tokens: int,
    decode_tokens: int,
    seed: int,
) -> tuple[torch.Tensor, str | None]:
    """What to read, and its text where there is one."""
    if text is None:
        pieces = -(-tokens // decode_tokens)
        random = torch.Generator().manual_seed(seed)
        vocabulary = loaded.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (pieces * (prompt_tokens + decode_tokens),), generator=random), None
    words = read_text(text)
    return encode(load_tokenizer(model, shape=shape), words), words


def _compare_live(
    model: str | None,
    shape: str | None,
    text: str | None,
    *,
    machine: str,
    gpu_memory: str | None,
    bits: int | None,
    names: Sequence[str],
    tokens: int,
    prompt_tokens: int,
    decode_tokens: int,
    seed: int,
) -> PoliciesReport:
    """Run the model under each policy on the same tokens: on the GPU there is, or on the machine's virtual clock."""
    on_gpu = torch.cuda.is_available()
    how: dict[str, Any] = (
        {"device": "cuda"} if on_gpu else {"device": "emulated", "clock": "virtual", "machine": machine}
    )
    pieces: dict[str, Any] = {"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens}
    loaded = load(model, shape=shape, seed=seed, device="cpu", bits=bits)
    ids, _ = _ids(model, shape, text, loaded, tokens, prompt_tokens, decode_tokens, seed)
    profile = trace_ids(loaded, model or shape or "", ids, tokens=tokens // 2, **pieces)
    rest = ids[len(profile.passes) - sum(one.phase is Phase.PREFILL for one in profile.passes) :]
    del loaded
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.trace"
        profile.save(path)
        for name in names:
            running = load(
                model, shape=shape, seed=seed, policy=name, gpu_memory=gpu_memory, bits=bits, profile=str(path), **how
            )
            rows.append(_live_row(name, running, rest, tokens - tokens // 2, pieces))
            running.moestro.close()
            del running
    where = torch.cuda.get_device_name() if on_gpu else f"{machine}'s virtual clock"
    return PoliciesReport(f"{model or shape} live on {where}", tuple(rows))


def _live_row(name: str, model: Any, ids: torch.Tensor, tokens: int, pieces: dict[str, Any]) -> PolicyRow:
    seconds, counted = dict.fromkeys(Phase, 0.0), dict.fromkeys(Phase, 0)
    conductor = model.moestro
    for phase, count, took_s in read_pieces(model, ids.to(model.device), tokens=tokens, **pieces):
        seconds[phase] += took_s
        counted[phase] += count
    counters = conductor.counters
    used = counters.hits + counters.joined + counters.misses
    return PolicyRow(
        policy=name,
        prefill_tok_s=counted[Phase.PREFILL] / seconds[Phase.PREFILL],
        decode_tok_s=counted[Phase.DECODE] / seconds[Phase.DECODE],
        hit_rate=counters.hits / used if used else 0.0,
        bytes_moved=counters.moved_bytes,
        share=None,
        slots=len(conductor.slots),
    )
