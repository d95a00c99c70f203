"""Captured steps of up to 16 tokens, of several sequences and several new ones: as uncaptured, and as alone."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import VOCABULARY, save_model
from moestro import load
from moestro.decode.capture import CapturedSteps, StepCache, can_capture
from moestro.devices.emulated import EmulatedDevice
from moestro.loading.gpu_need import Need, measure
from moestro.memory.allocations import StorageFollower
from moestro.planning.budget import Margin
from moestro.planning.contract import LayerSpec, ModelSpec, Step
from moestro.planning.plan import Budget, Facts, Formats, make_plan
from moestro.planning.text_shape import MOST_CAPTURED, Footprint

DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
FULL = {"sliding_window": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in ("mixtral", "qwen3_moe")}
    for family, folder in made.items():
        save_model(family, folder, FULL if family == "mixtral" else {})
    return made


def _loaded(folder: Path, device: str, *, fuse: bool) -> Any:
    memory = None if device == "cuda" else "560KiB"  # half of the experts
    options: dict[str, Any] = {"policy": "lru", "gpu_memory": memory, "threads": 1, "dtype": "float32", "seed": 0}
    return load(str(folder), device=device, fuse=fuse, **options)


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 28, (rows, length))


def _same(ours: Tensor, theirs: Tensor, device: str) -> None:
    if device == "emulated":
        assert torch.equal(ours, theirs)  # the same operations on the same numbers
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class _Listener:
    """Notes which experts each layer step asks for."""

    lookahead = 0

    def __init__(self) -> None:
        self.steps: list[dict[int, int]] = []

    def begin(self, info: Any) -> None: ...

    def asked(self, step: Step, top_k: int) -> None:
        self.steps.append(dict(step.tokens))

    def done(self, outcome: Any) -> None: ...


class _Text:
    """Rows of ragged length, padded on the left, read and then continued by some new tokens of each row at a time."""

    def __init__(self, rows: int, length: int = 7) -> None:
        self.pads = torch.randint(0, length - 1, (rows,))
        self.pads[0] = 0
        self.ids = _ids(rows, length)
        self.ids[torch.arange(length) < self.pads[:, None]] = 2

    def run(self, model: Any, steps: list[Tensor], only: int | None = None) -> Tensor:
        """Logits [rows, tokens, V] of all new tokens; of one row alone without its padding."""
        rows = slice(None) if only is None else slice(only, only + 1)
        ids, pads = self.ids[rows], self.pads[rows]
        if only is not None:
            ids, pads = ids[:, int(pads) :], torch.zeros(1, dtype=torch.long)
        cache, logits, read = StepCache(model.config, 64), [], 0
        with torch.no_grad():
            for tokens in (ids, *(step[rows] for step in steps)):
                places = torch.arange(read, read + tokens.shape[1])
                seen = torch.arange(cache.tokens)
                mask = (seen >= pads[:, None, None]) & (seen <= places[:, None])
                mask |= seen == places[:, None]  # what is padding sees itself
                positions = (places - pads[:, None]).clamp(min=0)
                given = {"attention_mask": mask[:, None], "position_ids": positions}
                moved = {name: tensor.to(model.device) for name, tensor in given.items()}
                logits.append(model(tokens.to(model.device), past_key_values=cache, **moved).logits.cpu())
                read += tokens.shape[1]
        return torch.cat(logits[1:], 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "new"), [(1, 16), (16, 1), (5, 3)])
def test_rows_and_new_tokens(rows: int, new: int, device: str, folders: dict[str, Path]) -> None:
    """Of ragged lengths: to the bit as without capture, each row as it is alone, and the same experts were copied."""
    text, results, counted, heard = _Text(rows), [], [], []
    steps = [_ids(rows, new) for _ in range(4)]
    family = "mixtral" if rows % 2 else "qwen3_moe"
    for fuse in (True, False):
        model = _loaded(folders[family], device, fuse=fuse)
        model.moestro.listener = listener = _Listener()
        results.append(text.run(model, steps))
        counters = model.moestro.counters
        counted.append((counters.tokens, counters.hits, counters.misses, counters.moved_bytes))
        heard.append(listener.steps)
        if fuse:
            assert (model.forward.figures.captures, model.forward.figures.replays) == (1, 2)
            top_k, layers = model.config.num_experts_per_tok, model.config.num_hidden_layers
        else:
            for row in {rows // 2, rows - 1}:
                alone = text.run(model, steps, only=row)
                torch.testing.assert_close(results[0][row], alone[0], rtol=1e-3, atol=1e-4)
        model.moestro.close()
    _same(*results, device)
    assert heard[0] == heard[1][: len(heard[0])]
    assert all(sum(step.values()) == rows * new * top_k for step in heard[0][layers:])
    assert counted[0] == counted[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beams", [4, 16])
def test_beams(beams: int, device: str, folders: dict[str, Path]) -> None:
    ids, results = _ids(1, 5), []
    for fuse in (True, False):
        model = _loaded(folders["qwen3_moe"], device, fuse=fuse)
        options = {"cache_implementation": "static", "max_new_tokens": 10, "num_beams": beams, **GREEDY}
        results.append(model.generate(ids.to(model.device), **options).cpu())
        if fuse:
            assert (model.forward.figures.captures, model.forward.figures.replays) == (1, 7)
        model.moestro.close()
    assert torch.equal(*results)


def test_one_capture_for_each_number_of_tokens(folders: dict[str, Path]) -> None:
    """Made when that number comes, kept while others come, and no more of them than 16."""
    model = _loaded(folders["qwen3_moe"], "emulated", fuse=True)
    assert isinstance(model.forward, CapturedSteps)
    cache, figures = StepCache(model.config, 300), model.forward.figures

    def step(tokens: int) -> None:
        at = int(cache.get_seq_length())
        places = torch.arange(at, at + tokens)
        mask = torch.arange(cache.tokens) <= places[:, None]
        given = {"attention_mask": mask[None, None], "position_ids": places[None]}
        model(_ids(1, tokens), past_key_values=cache, **given)
        cache.crop(-tokens)

    with torch.no_grad():
        step(3)
        for tokens in (1, 2, 16):
            for _ in range(2):
                step(tokens)
        assert (figures.captures, figures.replays) == (3, 0)
        for tokens in (16, 1, 2, 16):
            step(tokens)
        assert (figures.captures, figures.replays) == (3, 4)
        for _ in range(3):
            step(MOST_CAPTURED + 1)
        assert (figures.captures, figures.replays) == (3, 4)
        assert len(model.forward._of_caches[0].steps) == 3
    model.moestro.close()


# ---- the memory of captured steps


class _Inline:
    """Runs a device's work at once in the caller's thread, where its storages are followed."""

    def submit(self, work: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_what_a_captured_step_makes_is_planned_for(rows: int, folders: dict[str, Path]) -> None:
    """By a step of 16 tokens whose storages are followed, behind a cache that is full then."""
    model = _loaded(folders["mixtral"], "emulated", fuse=False)
    assert not model.moestro.gpu_plan.activation_bytes - _planned(model, 64, captures=False).activation_bytes
    found = _planned(model, 64, captures=True)
    assert found.activation_bytes == found.step_bytes + found.captured_bytes
    model.moestro.device._compute = _Inline()
    cache = StepCache(model.config, 64 // rows, 64 // rows)
    new = MOST_CAPTURED // rows
    with torch.no_grad():
        model(_ids(rows, 64 // rows - 2 * new), past_key_values=cache)
        model(_ids(rows, new), past_key_values=cache)
        ids = _ids(rows, new)
        with StorageFollower() as follower:
            output = model(ids, past_key_values=cache)
    assert output.logits.shape[:2] == (rows, new)
    assert follower.peak_bytes <= found.captured_bytes <= 6 * follower.peak_bytes
    model.moestro.close()


def _planned(model: Any, context: int, *, captures: bool) -> Footprint:
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    assert can_capture(on_meta)
    found = measure(on_meta, model.moestro.math, context, torch.device("cpu"), captures=captures)
    assert found.measured
    guessed = Need(on_meta, model.moestro.math, torch.device("cpu"), captures).estimated(context)
    assert bool(guessed.captured_bytes) == bool(found.captured_bytes) == captures
    assert guessed.captured_bytes >= 0.8 * found.captured_bytes
    return found


def test_experts_get_what_captured_steps_leave() -> None:
    spec = ModelSpec((LayerSpec(4, 64, 1000, hidden=8, block=64),) * 2, 0)
    facts = Facts(free_ram_bytes=10**9, free_gpu_bytes=10**6, margin=Margin(0, 0), dense_on_gpu=True, machine=None)
    plans = []
    for captured in (0, 2500):
        need = Footprint(16, 100, 200, 50, captured)
        plan = make_plan(
            spec,
            {16: need}.__getitem__,
            facts,
            formats=Formats(("bf16",) * 2),
            policy="lru",
            budget=Budget(gpu_bytes=8000),
            context=16,
        )
        plans.append(plan)
    (without, room), (beside, less_room) = ((plan.gpu, plan.room_bytes) for plan in plans)
    assert without is not None
    assert beside is not None
    assert beside.activation_bytes - without.activation_bytes == room - less_room == 2500
    assert without.experts - beside.experts == 2


def test_what_pretended_graphs_hold_is_no_gpus() -> None:
    assert not EmulatedDevice.graphs_have_memory
