"""Every policy, live on the virtual clock: the reference's logits, and the counts that a replay gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro import load
from moestro.devices.emulated import EmulatedDevice
from moestro.errors import RequestError
from moestro.machine import measure as this_machine
from moestro.planning.contract import Costs, Decision, Expert, ModelSpec, Move, Placement, Step, View
from moestro.planning.machines import machine_named
from moestro.planning.policies import POLICIES, BasePolicy, make_policy
from moestro.simulate.replay import replay
from moestro.simulate.trace import Trace
from moestro.text.tracing import listening, trace_ids
from tiny_runs import EXPERTS, logits_of, reference

MACHINE = "rtx4060-laptop"
RUNS = ((1, 1), (1, 40), (3, 5), (17, 1), (17, 40))  # batch, tokens of each prompt
STEPS = 2


def _on_virtual_clock(policy: str, slots: int, **options: Any) -> Any:
    spec = reference(RUNS, STEPS)[1]
    gpu_memory = spec.dense_bytes + slots * spec.slot_bytes
    how = {"device": "emulated", "clock": "virtual", "machine": MACHINE, "dtype": "float32"}
    return load(shape="tiny", policy=policy, gpu_memory=gpu_memory, **how, **options)


@pytest.mark.sample(16)
@pytest.mark.parametrize("slots", [0, 1, EXPERTS // 3, EXPERTS])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_gives_the_reference_logits_and_a_replay_its_counts(name: str, slots: int) -> None:
    expected, spec = reference(RUNS, STEPS)
    model = _on_virtual_clock(name, slots)
    with listening(model) as recorder:
        found = logits_of(model, RUNS, STEPS)
    trace = recorder.trace(model, "tiny", None)
    counters, clock = model.moestro.counters, model.moestro.time
    model.moestro.close()
    for logits, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

    again = replay(
        trace, make_policy(name), machine_named(MACHINE), gpu_bytes=spec.dense_bytes + slots * spec.slot_bytes
    )
    decode = again.decode
    assert (decode.hits, decode.joined, decode.misses) == (counters.hits, counters.joined, counters.misses)
    assert again.moved_bytes == counters.moved_bytes
    assert again.seconds == pytest.approx(clock.now_s)


@pytest.mark.parametrize("name", ["fiddler", "moestro"])
def test_a_profile_places_the_popular_experts(name: str, tmp_path: Path) -> None:
    model = load(shape="tiny", dtype="float32", device="cpu")
    ids = torch.randint(512, (200,), generator=torch.Generator().manual_seed(1))
    trace = trace_ids(model, "tiny", ids, tokens=60, prompt_tokens=8, decode_tokens=30)
    trace.save(tmp_path / "profile.trace")
    running = _on_virtual_clock(name, EXPERTS // 4, profile=str(tmp_path / "profile.trace"))
    conductor = running.moestro
    heat = trace.heat()
    hottest = sorted(heat, key=lambda key: -heat[key])[:4]
    assert all(conductor.slots.find(key) is not None for key in hottest)
    for logits, wanted in zip(logits_of(running, RUNS, STEPS), reference(RUNS, STEPS)[0], strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert conductor.counters.hits > 0
    conductor.close()


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    spec = ModelSpec(reference(RUNS, STEPS)[1].layers[:2], 0)
    Trace("other", spec, 2, None, []).save(tmp_path / "other.trace")
    with pytest.raises(RequestError, match="is of other, 2 layers of 8 experts; this model has 4 of 8"):
        _on_virtual_clock("fiddler", 8, profile=str(tmp_path / "other.trace"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clock": "sundial"}, "no clock 'sundial'; there are: wall, virtual"),
        ({"clock": "virtual", "device": "cpu", "machine": "rtx4090"}, "needs device='emulated' and machine='NAME'"),
        ({"clock": "virtual", "device": "emulated"}, "needs device='emulated' and machine='NAME'"),
        ({"machine": "abacus"}, "no machine 'abacus'; there are: t4-colab"),
        ({"profile": "/nowhere.trace", "device": "emulated"}, "the trace /nowhere.trace cannot be read"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, str], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        load(shape="tiny", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [1, 8, 20])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_after_a_failed_copy_or_an_interrupt_the_next_request_works(name: str, slots: int) -> None:
    expected = reference(RUNS, STEPS)[0][0]
    model = _on_virtual_clock(name, slots)
    device, random = model.moestro.device, torch.Generator().manual_seed(0)
    ids = torch.randint(512, (1, 1 + STEPS), generator=random)[:, :1]
    policy = model.moestro.policy
    decide, send = policy.decide, device.link.carrier.send
    calls = {"decide": 0, "copy": 0}

    def interrupted(*args: Any) -> Any:
        calls["decide"] += 1
        if calls["decide"] == 3:
            raise KeyboardInterrupt
        decision = decide(*args)
        if calls["decide"] == 7:  # its books are ahead of the slots now
            raise KeyboardInterrupt
        return decision

    def failing(*args: Any) -> Any:
        calls["copy"] += 1
        if calls["copy"] in (2, 9, 17):
            raise OSError("the link broke")
        return send(*args)

    policy.decide, device.link.carrier.send = interrupted, failing
    failures = 0
    for _ in range(12):
        try:
            model(input_ids=torch.randint(512, (2, 3), generator=random))
        except (KeyboardInterrupt, OSError):
            failures += 1
    assert failures >= 2
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.moestro.close()


def test_this_machine_is_measured_while_a_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built under the meta device, where a tensor without a device has no bytes."""
    with torch.device("meta"):
        costs = this_machine.this_machine(EmulatedDevice()).costs
    assert costs.cpu_gbps
    assert costs.link_gbps == 12.0
    assert costs.cpu_gflops
    seen: list[torch.device] = []
    monkeypatch.setattr(this_machine, "_measured", lambda *_: seen.append(torch.empty(1).device))
    with torch.device("meta"):
        this_machine.this_machine(EmulatedDevice())
    assert seen == [torch.device("cpu")]


# ---- a policy of one's own, as docs/policies.md shows it


def _from_the_docs() -> type[BasePolicy]:
    text = (Path(__file__).parents[1] / "docs" / "policies.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 40
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # our own documentation
    found = [value for value in namespace.values() if isinstance(value, type) and issubclass(value, BasePolicy)]
    return next(value for value in found if value is not BasePolicy)


def test_the_documented_policy_of_40_lines_runs_live_and_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = _from_the_docs()
    monkeypatch.setitem(POLICIES, policy.name, policy)
    test_a_policy_gives_the_reference_logits_and_a_replay_its_counts(policy.name, EXPERTS // 3)


class Careless(BasePolicy):
    """Gives the GPU what is not there."""

    name = "careless"

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        return Placement(slots=self.slots)

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        return Decision(gpu=self.whole(step, step.tokens), moves=(Move((step.layer, 0)),))


def test_an_unlawful_policy_is_named_live_and_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, Careless.name, Careless)
    model = _on_virtual_clock(Careless.name, 4)
    with pytest.raises(Exception, match=r"layer 0: expert . is given to the GPU, but is not there nor on its way"):
        logits_of(model, RUNS, STEPS)
    model.moestro.close()
