"""Steps begin by themselves: the first call of any entry point gives what Transformers gives, announced or not."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from families import random_ids, save_model
from moestro import load
from moestro.engine.steps import PREFILL_TOKENS, StepOfThread, step_info
from moestro.loading.build import conduct_by
from moestro.planning.contract import GPU0, Phase, StepInfo
from moestro.planning.machines import machine_named
from moestro.planning.policies import POLICIES, make_policy
from moestro.text.tracing import trace_ids

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
EXPERTS = 3 * 8  # of the family's small model
MACHINE = "rtx4060-laptop"
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "cpu, not fused": {"device": "cpu", "fuse": False},
    "emulated": {"device": "emulated", "machine": MACHINE, "policy": "cpu-only", "link": "1GB/s"},
    "virtual": {"device": "emulated", "machine": MACHINE, "policy": "cpu-only", "clock": "virtual"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    save_model("olmoe", path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@contextmanager
def _loaded(folder: Path, device: str, **options: Any) -> Iterator[Any]:
    how = {"dtype": "float32", "threads": 1, **DEVICES[device], **options}
    model = load(str(folder), **how)
    pool = model.moestro.device.pool
    model.moestro.device.pool = lambda *size: pool(*size).fill_(0xFF)  # not a number
    try:
        yield model
    finally:
        model.moestro.close()


def _fresh(model: Any, policy: str, slots: int) -> Any:
    """The model before its first step, by a policy that wants experts in slots from the start if it ever does."""
    spec = model.moestro.spec
    random = torch.Generator().manual_seed(slots)
    heat = {
        (layer, expert): float(torch.rand((), generator=random))
        for layer, of in enumerate(spec.layers)
        for expert in range(of.experts)
    }
    costs = machine_named(MACHINE).costs
    return conduct_by(model, make_policy(policy), slots * spec.slot_bytes, heat, costs)


# Entry points: what each gives of a model, Transformers' own or ours.

IDS, PROMPT = random_ids(2, 5), random_ids(1, 20)


def _experts(model: Any, layer: int, tokens: int, seed: int) -> Tensor:
    """The experts module of a layer by itself."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, model.config.hidden_size, generator=random)
    index = torch.rand(tokens, 8, generator=random).topk(2).indices
    return model.model.layers[layer].mlp.experts(x, index, torch.rand(tokens, 2, generator=random))


def _layer(model: Any) -> Tensor:
    """A decoder layer by itself."""
    x = torch.randn(1, 6, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    positions = model.model.rotary_emb(x, torch.arange(6)[None])
    out = model.model.layers[1](x, position_embeddings=positions, attention_mask=None)
    return out if isinstance(out, Tensor) else out[0]


def _steps_by_forward(model: Any) -> list[Tensor]:
    """A prompt and decoded tokens, none of which is announced."""
    out, found = model.forward(PROMPT, use_cache=True), []
    for token in range(3, 7):
        found.append(out.logits[:, -1])
        out = model.forward(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return [*found, out.logits]


def _generated(model: Any, **how: Any) -> list[Tensor]:
    out = model.generate(IDS, output_logits=True, return_dict_in_generate=True, **GREEDY, **how)
    return [out.sequences, *out.logits]


def _in_threads(calls: list[Callable[[Any], Any]], model: Any) -> list[Tensor]:
    """Each call from a thread of its own, all at once."""
    found: dict[int, Any] = {}
    together = threading.Barrier(len(calls))

    def run(i: int) -> None:
        with torch.no_grad():
            together.wait()
            found[i] = calls[i](model)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [part for i in range(len(calls)) for part in (found[i] if isinstance(found[i], list) else [found[i]])]


def _after(error: type[BaseException], where: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A call of `model` fails in its midst, and then comes another one."""

    def run(model: Any) -> Any:
        if not hasattr(model, "moestro"):
            return call(model)
        conductor = model.moestro
        policy, device, attention = conductor.policy, conductor.device, model.model.layers[1].self_attn
        owner, name = {
            "decide": (policy, "decide"),
            "begin": (policy, "begin"),
            "run": (device.accelerator, "run"),
            "copy": (device.accelerator, "copy"),
            "attention": (attention, "forward"),
            "settle": (getattr(device.accelerator, "link", None), "settle"),
        }[where]
        if owner is not None:
            fails = mock.patch.object(owner, name, side_effect=error("in the midst"))
            also = mock.patch.object(policy, "decide", side_effect=error("in the midst"))
            with fails, also if where == "settle" else mock.MagicMock(), suppress(error):
                model(PROMPT)
        return call(model)

    return run


def _interrupted_without_end(model: Any) -> Any:
    """As above, where no hook said that the step was over: torch calls none after Ctrl-C."""
    return _after(KeyboardInterrupt, "attention", lambda m: m.forward(IDS).logits)(model)


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "call": lambda m: m(IDS).logits,
    "forward": lambda m: m.forward(IDS).logits,
    "forward, a long prompt": lambda m: m.forward(PROMPT).logits,
    "inner model": lambda m: m.model(IDS).last_hidden_state,
    "inner forward": lambda m: m.model.forward(PROMPT).last_hidden_state,
    "embeddings": lambda m: m(inputs_embeds=m.get_input_embeddings()(IDS)).logits,
    "steps by forward": _steps_by_forward,
    "generate": _generated,
    "generate, static": lambda m: _generated(m, cache_implementation="static"),
    "generate, beams": lambda m: m.generate(IDS, num_beams=3, **GREEDY),
    "layer": _layer,
    "mixture": lambda m: m.model.layers[2].mlp(torch.ones(1, 4, m.config.hidden_size))[0],
    "experts": lambda m: _experts(m, 1, 4, 1),
    "layers backwards": lambda m: [_experts(m, layer, 2 + layer, layer) for layer in (2, 0, 0, 1, 2, 2, 1)],
    "a thread": lambda m: _in_threads([lambda m: m.forward(IDS).logits], m),
    "threads at once": lambda m: _in_threads([_steps_by_forward, _generated, lambda m: m.model(IDS)[0]], m),
    "after an error in decide": _after(ValueError, "decide", lambda m: m.forward(IDS).logits),
    "after an error in begin": _after(ValueError, "begin", lambda m: m.forward(IDS).logits),
    "after an error in run": _after(ValueError, "run", lambda m: m.model(IDS)[0]),
    "after an error in copy": _after(RuntimeError, "copy", lambda m: m.forward(PROMPT).logits),
    "after an error in attention": _after(ValueError, "attention", _steps_by_forward),
    "after Ctrl-C in decide": _after(KeyboardInterrupt, "decide", lambda m: m(IDS).logits),
    "after Ctrl-C in attention": _interrupted_without_end,
    "after Ctrl-C twice": _after(KeyboardInterrupt, "settle", _steps_by_forward),
}


@pytest.fixture(scope="module")
def expected(reference: Any) -> dict[str, list[Tensor]]:
    with torch.no_grad():
        return {name: _listed(call(reference)) for name, call in ENTRIES.items()}


def _listed(found: Any) -> list[Tensor]:
    return found if isinstance(found, list) else [found]


def _same(found: Any, wanted: list[Tensor], what: str) -> None:
    for ours, theirs in zip(_listed(found), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("device", ["cpu", "cpu, not fused"])
def test_first_call_on_the_cpu(device: str, mode: Any, folder: Path, expected: dict[str, list[Tensor]]) -> None:
    with _loaded(folder, device) as model, mode():
        for name, call in ENTRIES.items():
            if name.startswith("after") and ("run" in name or "copy" in name or "twice" in name):
                continue  # which nothing calls there
            if device == "cpu" and "attention" in name:
                continue  # which is fused, so that no forward of its own is called
            _same(call(model), expected[name], name)


@pytest.mark.sample(10)
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(
    ("device", "slots"), [("emulated", 7), ("emulated", 16), ("virtual", 9), ("emulated", EXPERTS)]
)
def test_first_call(device: str, slots: int, policy: str, folder: Path, expected: dict[str, list[Tensor]]) -> None:
    """Of a conductor each, with slots that hold no numbers."""
    with _loaded(folder, device) as model:
        for number, (name, call) in enumerate(ENTRIES.items()):
            _fresh(model, policy, slots)
            with torch.inference_mode() if number % 2 else torch.no_grad():
                _same(call(model), expected[name], f"{name}, {policy}, {slots} slots on {device}")


@pytest.mark.parametrize("policy", ["moestro", "lru", "lru-speculative"])
def test_generate_batch(policy: str, folder: Path, reference: Any) -> None:
    """Transformers' continuous batching: rows one behind the other, in a thread of its own, with a cache of its own."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [[3, 4, 5], [6, 7, 8, 9], list(range(3, 15)), [5]]
    wanted = [reference.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in prompts]
    with _loaded(folder, "emulated") as model:
        conductor = _fresh(model, policy, 9)
        begun: list[StepInfo] = []
        begin = conductor.policy.begin
        conductor.policy.begin = lambda info, *rest: begun.append(info) or begin(info, *rest)
        urgent, copy = set(), conductor.device.copy
        conductor.device.copy = lambda *given: urgent.add(given[2]) or copy(*given)
        settings = GenerationConfig(**GREEDY | {"eos_token_id": -1})
        small = ContinuousBatchingConfig(max_batch_tokens=64, num_blocks=16)  # else most of the RAM
        how = {"generation_config": settings, "continuous_batching_config": small, "warmup": False}
        found = model.generate_batch(prompts, **how)
        assert sorted(each.generated_tokens for each in found.values()) == sorted(wanted)
        decode = [info for info in begun if info.phase is Phase.DECODE]
        assert sum(sum(info.prompt_tokens) for info in begun) == sum(map(len, prompts))
        assert sum(sum(info.decode_tokens) for info in begun) == len(prompts) * (GREEDY["max_new_tokens"] - 1)
        assert {info.rows for info in decode} >= {len(prompts)}
        counters = conductor.counters
        assert counters.hits + counters.joined > 0
        used = counters.hits + counters.joined + counters.misses
        assert len(decode) * 3 * 2 <= used <= len(decode) * 3 * EXPERTS // 3  # top-2 of 8 in each of 3 layers
        assert (False in urgent) == (policy != "lru")  # the others prefetch


def test_rows_behind_each_other_are_told_apart() -> None:
    """By what came before each: prompts, in one piece or several, and rows that are extended, in any order."""
    random = Random(torch.initial_seed())
    for _ in range(200):
        rows = [(random.choice((0, 0, 3, 40)), random.choice((1, 1, 2, 17))) for _ in range(random.randint(1, 6))]
        ends = torch.tensor([0, *accumulate(new for _, new in rows)], dtype=torch.int32)
        padded = torch.cat((ends, ends[-1:].expand(random.randint(0, 3))))  # rows that fill up have no tokens
        positions = torch.tensor([before + i for before, new in rows for i in range(new)] + [0] * random.randint(0, 2))
        given = {"input_ids": positions[None], "position_ids": positions[None], "cu_seq_lens_q": padded}
        info = step_info((), given, stream=7)
        extends = [before > 0 and new == 1 for before, new in rows]
        assert info.prompt_tokens == tuple(0 if e else new for e, (_, new) in zip(extends, rows, strict=True))
        assert info.decode_tokens == tuple(new if e else 0 for e, (_, new) in zip(extends, rows, strict=True))
        assert (info.rows, info.tokens, info.stream) == (len(rows), sum(new for _, new in rows), 7)
        assert info.phase is (Phase.DECODE if all(extends) else Phase.PREFILL)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 5), (16, 1), (8, 5), (2, PREFILL_TOKENS), (2, 17)])
def test_rows_of_a_batch_extend_what_their_cache_has(rows: int, count: int) -> None:
    ids = torch.zeros(rows, count, dtype=torch.int64)
    none, some = (mock.Mock(get_seq_length=lambda length=length: length) for length in (0, 3))
    for cache, phase in ((None, Phase.PREFILL), (none, Phase.PREFILL), (some, Phase.DECODE)):
        info = step_info((ids,), {"past_key_values": cache})
        assert (info.rows, info.tokens) == (rows, rows * count)
        assert info.phase is (Phase.PREFILL if count > PREFILL_TOKENS else phase)


@pytest.mark.parametrize("device", ["emulated", "virtual"])
def test_a_profile_fills_slots_before_the_first_step(
    device: str, folder: Path, expected: dict[str, list[Tensor]], tmp_path: Path
) -> None:
    with _loaded(folder, "cpu") as model:
        ids = torch.randint(3, 99, (80,), generator=torch.Generator().manual_seed(1))
        trace = trace_ids(model, "olmoe", ids, tokens=30, prompt_tokens=8, decode_tokens=10)
        trace.save(tmp_path / "profile.trace")
    options = {"policy": "moestro", "profile": str(tmp_path / "profile.trace"), "gpu_memory": "480KiB"}
    with _loaded(folder, device, **options) as model, torch.no_grad():
        conductor = model.moestro
        warm = conductor.slots.warm
        assert 0 < len(warm) < EXPERTS
        assert not any(conductor.slots.ready(expert) for expert in warm)  # nothing has copied them
        assert not conductor.slots.evictable()
        if device == "emulated":
            assert all(0 < conductor.view.ready_s(expert, GPU0) < float("inf") for expert in warm)
        _same(model.model(IDS)[0], expected["inner model"], "inner model")
        assert all(conductor.slots.ready(expert) for expert in warm)
        assert conductor.counters.hits > 0
        assert conductor.counters.moved_bytes == 0  # as in a replay, whose experts are there from the start


@pytest.mark.parametrize("how", ["broken", "interrupted", "interrupted twice"])
@pytest.mark.parametrize("name", ["forward", "steps by forward"])
def test_experts_that_did_not_arrive_are_not_taken_for_there(
    name: str, how: str, folder: Path, expected: dict[str, list[Tensor]]
) -> None:
    """The copies before the first step fail, or Ctrl-C comes meanwhile."""
    with _loaded(folder, "emulated") as model, torch.no_grad():
        conductor = _fresh(model, "moestro", 12)
        link = conductor.device.link
        send, sent = link.carrier.send, []

        def fails(*given: Any) -> Any:
            sent.append(given)
            if how == "broken" and len(sent) % 2:
                raise OSError("the link is down")
            return send(*given)

        link.carrier.send = fails
        if how == "broken":
            _same(ENTRIES[name](model), expected[name], name)
            assert sent
            assert sum(conductor.slots.ready(expert) for expert in conductor.slots.warm) < len(conductor.slots.warm)
        else:
            settle = link.settle if how == "interrupted" else mock.Mock(side_effect=KeyboardInterrupt)
            with (
                mock.patch("moestro.devices.link.LaneCopy.wait", side_effect=KeyboardInterrupt),
                mock.patch.object(link, "settle", settle),
                pytest.raises(KeyboardInterrupt),
            ):
                ENTRIES[name](model)
        _same(ENTRIES[name](model), expected[name], name)


def test_an_error_in_one_thread_is_told_to_the_policy_before_another_threads_next_layer(
    folder: Path, expected: dict[str, list[Tensor]]
) -> None:
    """Its slots were emptied in the midst of that one's step."""
    for policy in sorted(POLICIES):
        with _loaded(folder, "emulated") as model, torch.no_grad():
            conductor = _fresh(model, policy, 9)
            model(IDS)

            def fail(_: Any, given: Any, conductor: Any = conductor, model: Any = model) -> None:
                def run() -> None:
                    with (
                        torch.no_grad(),
                        mock.patch.object(conductor.policy, "decide", side_effect=ZeroDivisionError),
                        pytest.raises(ZeroDivisionError),
                    ):
                        _experts(model, 0, 2, 1)

                thread = threading.Thread(target=run)
                thread.start()
                thread.join()

            hook = model.model.layers[1].register_forward_pre_hook(fail)
            _same(model(IDS).logits, expected["call"], policy)
            _same(model.forward(IDS).logits, expected["forward"], policy)
            hook.remove()


def test_another_policy_gets_the_memory_of_the_one_before_and_fills_its_slots(
    folder: Path, expected: dict[str, list[Tensor]]
) -> None:
    """Also where a copy of the one before has failed."""
    with _loaded(folder, "emulated") as model, torch.no_grad():
        conductor = _fresh(model, "lru", 9)
        with mock.patch.object(conductor.device.link.carrier, "send", side_effect=OSError("the link is down")):
            _same(model(IDS).logits, expected["call"], "call")
        model(PROMPT)
        before = weakref.ref(conductor.slots.memory)
        gc.collect()  # the failure's traceback
        gc.disable()
        try:
            conductor = _fresh(model, "moestro", 9)
            assert before() is None
        finally:
            gc.enable()
        _same(model.forward(IDS).logits, expected["forward"], "forward")
        assert conductor.slots.warm
        assert all(conductor.slots.ready(expert) for expert in conductor.slots.warm)


def _counts(model: Any, announced: bool) -> tuple[int, int, int]:
    """Layer steps, choices, and (expert, step) pairs of a prompt and of decoded tokens."""
    call = model if announced else model.forward
    with torch.no_grad():
        out = call(PROMPT, use_cache=True)
        for token in range(3, 9):
            out = call(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    counters = model.moestro.counters
    return counters.layer_steps, counters.tokens, counters.hits + counters.joined + counters.misses


@pytest.mark.parametrize("announced", [True, False])
def test_all_ways_count_the_same(announced: bool, folder: Path) -> None:
    found = {}
    for device in DEVICES:
        with _loaded(folder, device) as model:
            if not device.startswith("cpu"):
                for policy in ("cpu-only", "moestro", "fiddler", "lru"):
                    for slots in (0, 3, EXPERTS):
                        _fresh(model, policy, slots)
                        found[device, policy, slots] = _counts(model, announced)
            else:
                found[device, "", 0] = _counts(model, announced)
    assert set(found.values()) == {(3 * 7, 2 * 3 * (20 + 6), 2 * 3 * 6)}


def test_captured_steps_count_the_same(folder: Path) -> None:
    found = []
    for fuse in (True, False):
        with _loaded(folder, "emulated", fuse=fuse, gpu_memory="480KiB") as model:
            for policy in ("moestro", "lru"):
                _fresh(model, policy, 9)
                model.generate(PROMPT, cache_implementation="static", **GREEDY | {"max_new_tokens": 12})
                counters = model.moestro.counters
                used = counters.hits + counters.joined + counters.misses
                found.append((counters.layer_steps, counters.tokens, used))
                assert not fuse or model.forward.figures.replays > 0
    assert set(found) == {(3 * 12, 2 * 3 * (20 + 11), 2 * 3 * 11)}


# When a step begins.


def test_a_step_that_nothing_announced_begins_where_a_layer_does_not_follow() -> None:
    step, begun = StepOfThread(), []
    for layer in (1, 2, 5, 5, 0, 3, 3, 2):
        if step.begins_at(layer):
            step.begin(StepInfo.alike(Phase.DECODE, 1), announced=False)
            begun.append(layer)
        step.layer = layer
    assert begun == [1, 5, 0, 3, 2]


def test_an_announced_step_lasts_until_its_end() -> None:
    step = StepOfThread()
    step.begin(StepInfo.alike(Phase.PREFILL, 3), announced=True)
    for layer in (0, 1, 1, 0):
        assert not step.begins_at(layer)
        step.layer = layer
    step.end()
    assert step.begins_at(2)
    assert step.info.phase is Phase.PREFILL


def test_begin_and_end_are_heard_once_a_call(folder: Path) -> None:
    with _loaded(folder, "emulated") as model, torch.no_grad():
        conductor = _fresh(model, "lru", 9)
        begun = []
        begin = conductor.policy.begin
        conductor.policy.begin = lambda info, *rest: begun.append((info.tokens, info.phase.name)) or begin(info, *rest)
        model(IDS)
        out = model(PROMPT, use_cache=True)
        model(IDS[:1, :2], past_key_values=out.past_key_values, use_cache=True)
        assert begun == [(10, "PREFILL"), (20, "PREFILL"), (2, "DECODE")]
        begun.clear()
        model.forward(PROMPT)
        model.model(PROMPT[:, :PREFILL_TOKENS])
        _experts(model, 2, 3, 0)
        _experts(model, 2, 3, 0)
        assert begun == [(20, "PREFILL"), (16, "DECODE"), (3, "DECODE"), (3, "DECODE")]
        begun.clear()
        with (
            mock.patch.object(model.model.layers[0].self_attn, "forward", side_effect=ZeroDivisionError),
            pytest.raises(ZeroDivisionError),
        ):
            model(IDS)
        model.forward(IDS)
        assert begun == [(10, "PREFILL"), (10, "DECODE")]
        begun.clear()
        with (
            mock.patch.object(conductor.policy, "decide", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            model(PROMPT)  # of which torch tells no hook
        model.forward(IDS)
        assert begun == [(20, "PREFILL"), (10, "DECODE")]
