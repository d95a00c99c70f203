"""Whole models on the emulated device, on the wall clock: real threads, a slow link, slots that are too few.

Nothing here is about speed: two cores cannot be a GPU and a CPU.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro import load
from moestro.errors import RequestError
from moestro.planning.contract import Lane
from moestro.planning.policies import POLICIES
from moestro.planning.timeline import Timeline
from moestro.text.tracing import listening
from tiny_runs import EXPERTS, logits_of, reference

RUNS = ((1, 1), (1, 40), (3, 5), (17, 3))  # batch, tokens of each prompt
STEPS = 3
SLOTS = {"one": 1, "a third": EXPERTS // 3, "all": EXPERTS}


@functools.cache
def _needed_bytes() -> int:
    """What the pretended GPU needs besides slots."""
    model = load(shape="tiny", dtype="float32", device="emulated", policy="cpu-only", gpu_memory="1GiB", context=64)
    model.moestro.close()
    return int(model.moestro.gpu_plan.needed_bytes)


def _emulated(policy: str, slots: int, **options: Any) -> Any:
    spec = reference(RUNS, STEPS)[1]
    how = {"device": "emulated", "dtype": "float32", "link": "0.1GB/s", "machine": "rtx4060-laptop"} | options
    return load(shape="tiny", policy=policy, context=64, gpu_memory=_needed_bytes() + slots * spec.slot_bytes, **how)


@pytest.mark.sample(10)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_gives_the_reference_logits(name: str, slots: str) -> None:
    model = _emulated(name, SLOTS[slots])
    for found, wanted in zip(logits_of(model, RUNS, STEPS), reference(RUNS, STEPS)[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    model.moestro.close()


@pytest.mark.parametrize("name", ["lru", "lru-speculative"])
def test_the_link_is_not_idle_while_a_copy_could_go(name: str) -> None:
    """A link slow enough that threads are quick beside it: an expert takes 25 ms."""
    model = _emulated(name, 6, link="0.005GB/s")
    conductor, timeline = model.moestro, Timeline()
    ids = torch.randint(512, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(input_ids=ids[:, :4], use_cache=True)
        before_s = conductor.device.link.counters.idle_s
        with conductor.note_on(timeline):
            for at in range(4, 24):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        idle_s = conductor.device.link.counters.idle_s - before_s
    conductor.close()
    spans = timeline.spans
    took_s = max(end_s for *_, end_s, _ in spans) - min(start_s for _, _, start_s, _, _ in spans)
    assert {lane for lane, *_ in spans} >= {Lane.GPU, Lane.LINK}
    assert idle_s <= 0.05 * took_s
    link = sorted((start_s, end_s) for lane, _, start_s, end_s, _ in spans if lane is Lane.LINK)
    assert all(end_s <= next_s + 1e-9 for (_, end_s), (next_s, _) in pairwise(link))


def test_a_timeline_of_a_run_shows_gpu_link_and_cpu(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    options = ["--device", "emulated", "--gpu-memory", "16MiB", "--context", "64", "--policy", "bandwidth-split"]
    options += ["--link", "0.5GB/s", "--machine", "rtx4060-laptop", "--timeline", str(target)]
    command = [sys.executable, "-m", "moestro.cli.main", "run", "demo", "Once upon a time", "-n", "6", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events = json.loads(target.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    drawn = [event for event in events if event["ph"] == "X"]
    assert {lanes[event["tid"]] for event in drawn} == {"gpu", "link", "cpu"}
    assert min(event["ts"] for event in drawn) == 0
    assert all(event["dur"] >= 0 for event in drawn)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cpu", "link": "12GB/s"}, "link needs a device with a link"),
        ({"device": "emulated", "link": "quick"}, "link='quick' is no rate; write it like 12GB/s"),
        ({"device": "emulated", "link": "0"}, "link='0' is no rate"),
    ],
)
def test_a_pace_that_cannot_be_kept_is_refused(options: dict[str, str], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        load(shape="tiny", **options)  # type: ignore[arg-type]


def test_an_interrupted_run_ends_at_once() -> None:
    """Ctrl-C while experts are on their way, in a process of its own: no thread keeps it alive."""
    code = """
import signal, threading, moestro, torch, os
spec_bytes = 2_000_000
model = moestro.load(shape="tiny", policy="lru", device="emulated", gpu_memory=spec_bytes, context=8, link="0.001GB/s",
                     machine="rtx4060-laptop", dtype="float32")
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=500)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "interrupted\n", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"layer-streaming"}))
@pytest.mark.parametrize("slots", [2, 10])
def test_a_prompt_copies_an_expert_once_at_most_and_only_those_that_have_tokens(name: str, slots: int) -> None:
    """Layer streaming copies all of them, which is its method."""
    model = _emulated(name, slots, link="1GB/s")
    conductor, timeline = model.moestro, Timeline()
    with listening(model, 0) as recorder, conductor.note_on(timeline), torch.no_grad():
        model(input_ids=torch.randint(512, (1, 24), generator=torch.Generator().manual_seed(3)))
    conductor.close()
    (step,) = recorder.trace(model, "tiny", None).passes
    used = {(one.layer, expert) for one in step.steps for expert in one.tokens}
    copied = [expert for lane, expert, *_ in timeline.spans if lane is Lane.LINK]
    assert len(copied) == len(set(copied))
    if name != "lru-speculative":  # whose guesses may be wrong
        assert set(copied) <= used
