"""Memory is planned for as many sequences as will run at a time: beams, and requests of a server."""

from __future__ import annotations

from typing import Any

import pytest

from moestro import load, load_tokenizer
from moestro.errors import BudgetError, RequestError
from moestro.loading.outlook import Place, choose, place_of
from moestro.loading.survey import survey
from moestro.planning.budget import Budget, columns_for
from moestro.planning.contract import LayerSpec, ModelSpec
from moestro.planning.options import ModelOptions, Options
from moestro.planning.plan import Facts, Formats, Plan, make_plan
from moestro.planning.text_shape import Footprint
from moestro.serve.engine import Engine

MIB = 2**20
SPEC = ModelSpec((LayerSpec(experts=8, neurons=64, expert_bytes=MIB),), dense_bytes=MIB)
TOKEN_BYTES = 1024


def planned(sequences: int | None, *, free_mib: int = 64, gpu_mib: int | None = None, ram: str | None = None) -> Plan:
    facts = Facts(free_ram_bytes=free_mib * MIB, free_gpu_bytes=None if gpu_mib is None else gpu_mib * MIB)
    return make_plan(
        SPEC,
        lambda tokens: Footprint(tokens, TOKEN_BYTES * tokens, MIB, MIB),
        facts,
        formats=Formats(("bf16",)),
        policy="cpu-only" if gpu_mib is None else "moestro",
        budget=Budget.parse(ram=ram),
        context=1024,
        sequences=sequences,
    )


def test_keys_and_values_of_all_sequences_are_counted() -> None:
    assert planned(None).kv_bytes == 0
    assert planned(1).kv_bytes == 1024 * TOKEN_BYTES
    assert planned(5).kv_bytes == 5 * columns_for(1024) * TOKEN_BYTES
    on_gpu = planned(5, gpu_mib=13)
    assert on_gpu.kv_bytes == 0
    assert on_gpu.gpu is not None
    assert on_gpu.gpu.kv_bytes == 5 * columns_for(1024) * TOKEN_BYTES
    assert "5 x 1024 tokens" in on_gpu.in_words()
    one = planned(None, gpu_mib=13)
    assert one.gpu is not None
    assert one.gpu.experts > on_gpu.gpu.experts  # which have what the caches leave


def test_sequences_that_do_not_fit_in_ram_are_refused_with_the_numbers() -> None:
    assert planned(2, free_mib=12).why_not is None
    assert planned(3, free_mib=12).why_not == (
        "the model needs 12.4 MiB of RAM (experts 8.0 MiB, keys and values 3.4 MiB), but this machine has free "
        "12.0 MiB; free memory or take a smaller model, or fewer or shorter sequences"
    )
    assert planned(3, free_mib=12, ram="9MiB").why_not is None  # a named RAM is for weights


def test_a_step_takes_as_many_sequences_as_were_planned() -> None:
    gpu = planned(4, gpu_mib=13).gpu
    assert gpu is not None
    gpu.check_tokens(1000, 24, 4)
    with pytest.raises(RequestError, match=r"5 sequences of .* planned for 4 x 1024; .* sequences=5"):
        gpu.check_tokens(1000, 24, 5)
    with pytest.raises(RequestError, match=r"planned for 4 x 1024; .* context="):
        gpu.check_tokens(2000, 24, 4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("demo")


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("requests", [1, 3])
def test_the_engine_takes_what_was_planned(device: str, requests: int, tokenizer: Any) -> None:
    options: dict[str, Any] = {"device": device, "context": 128, "sequences": requests, "threads": 1}
    if device == "emulated":
        options["gpu_memory"] = "64MiB"
    model = load("demo", dtype="float32", **options)
    engine = Engine(model, tokenizer, max_requests=requests, context=128)
    try:
        if device == "emulated":
            plan = model.moestro.gpu_plan
            assert plan is not None
            kv_bytes = plan.kv_bytes
        else:
            found = survey("demo", ModelOptions(dtype="float32"))
            kv_bytes = choose(found, Options(**options), place_of(Options())).kv_bytes
        if requests == 1:  # a room for rows that move, which one row does not need
            kv_bytes = kv_bytes * columns_for(128) // 128
        assert engine.kv_bytes == kv_bytes
    finally:
        engine.close()


def test_the_engine_refuses_more_than_was_planned(tokenizer: Any) -> None:
    model = load("demo", dtype="float32", threads=1, device="emulated", gpu_memory="64MiB", context=128, sequences=2)
    with pytest.raises(RequestError, match="3 sequences of 128 tokens"):
        Engine(model, tokenizer, max_requests=3, context=128)


def test_a_load_refuses_sequences_that_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    import moestro.loading.build as building

    monkeypatch.setattr(building, "available_ram_bytes", lambda: 50 * MIB)
    load("demo", dtype="float32", threads=1, device="cpu", sequences=1, context=128)
    with pytest.raises(BudgetError, match=r"keys and values .* fewer or shorter sequences"):
        load("demo", dtype="float32", threads=1, device="cpu", sequences=64, context=512)


def test_a_forecast_counts_them_too() -> None:
    found = survey("demo", ModelOptions())
    place: Place = place_of(Options())
    one, many = (choose(found, Options(context=256, sequences=n), place) for n in (1, 16))
    assert many.kv_bytes == one.kv_bytes * columns_for(256) // 256 * 16
    assert many.ram_bytes - one.ram_bytes == many.kv_bytes - one.kv_bytes
