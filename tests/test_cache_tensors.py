"""Keys and values that a caller took from a cache stay what they are: trees, crops, copies, caches that are gone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from families import save_model
from moestro import load

HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
WAYS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "emulated": {"device": "emulated", "policy": "lru", "gpu_memory": "450KiB", "context": 64},
}


@pytest.fixture(scope="module", params=WAYS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ours, Transformers', and the kind of cache with which ours goes its fast way."""
    folder: Path = tmp_path_factory.mktemp("model")
    reference = save_model("olmoe", folder, HEADS)
    model = load(str(folder), threads=1, dtype="float32", **WAYS[request.param])
    yield model, reference, request.param
    model.moestro.close()


def _cache(model: Any, kind: str) -> Any:
    return DynamicCache(config=model.config) if kind == "cpu" else StaticCache(config=model.config, max_cache_len=48)


@torch.no_grad()
def _step(model: Any, cache: Any, tokens: Any) -> Tensor:
    return model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1]


def _kept(cache: Any, clone: bool) -> list[list[Tensor]]:
    names = [name for name in ("keys", "values", "cumulative_length") if hasattr(cache.layers[0], name)]
    return [
        [getattr(layer, name).clone() if clone else getattr(layer, name) for name in names] for layer in cache.layers
    ]


def _put(cache: Any, states: list[list[Tensor]], clone: bool) -> None:
    for layer, tensors in zip(cache.layers, states, strict=True):
        for name, tensor in zip(("keys", "values", "cumulative_length"), tensors, strict=False):
            setattr(layer, name, tensor.clone() if clone else tensor)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("step"), st.integers(3, 90)),
            st.tuples(st.just("keep"), st.integers(0, 0)),
            st.tuples(st.just("put"), st.integers(0, 9)),
            st.tuples(st.just("crop"), st.integers(1, 3)),
            st.tuples(st.just("copy"), st.integers(0, 0)),
            st.tuples(st.just("shallow"), st.integers(0, 0)),
            st.tuples(st.just("reorder"), st.integers(0, 0)),
            st.tuples(st.just("several"), st.integers(3, 90)),
        ),
        min_size=4,
        max_size=16,
    )
)
def test_a_cache_in_a_callers_hands(models: Any, actions: list[tuple[str, int]]) -> None:
    """The same random actions with Transformers' model: logits of each step, and all that was kept in the end."""
    model, reference, kind = models
    results = []
    for each in (model, reference):
        cache, logits, states = _cache(each, kind), [], []
        logits.append(_step(each, cache, [5, 6, 7, 8]))
        for action, number in actions:
            if int(cache.get_seq_length()) > 40:
                break
            if action == "step":
                logits.append(_step(each, cache, [number]))
            elif action == "several":
                logits.append(_step(each, cache, [number, number + 1, number + 2]))
            elif action == "keep":
                states.append(_kept(cache, clone=kind != "cpu"))
            elif action == "put" and states:
                _put(cache, states[number % len(states)], clone=kind != "cpu")
            elif action == "crop" and kind == "cpu" and cache.get_seq_length() > 4:
                cache.crop(-number)
            elif action == "copy":
                cache = copy.deepcopy(cache)
            elif action == "shallow" and kind == "cpu":
                other = DynamicCache(config=each.config)
                other.layers = [copy.copy(layer) for layer in cache.layers]
                states.append(_kept(cache, clone=False))
                cache = other
            elif action == "reorder":
                cache.reorder_cache(torch.tensor([0]))
        results.append((torch.stack(logits), [part for state in states for layer in state for part in layer]))
    (ours, our_states), (theirs, their_states) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(our_states) == len(their_states)
    for a, b in zip(our_states, their_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("what", ["gone", "replaced"])
def test_tensors_of_a_cache_that_is_gone_or_has_others(models: Any, what: str, view: bool) -> None:
    """A caller holds them, or views of them: nothing writes to them any more."""
    model, _, kind = models
    cache = _cache(model, kind)
    _step(model, cache, [5, 6, 7, 8])
    for token in (9, 10, 11, 12, 13):
        _step(model, cache, [token])
    held = [part[:, :, :4] if view else part for layer in cache.layers for part in (layer.keys, layer.values)]
    before = [part.clone() for part in held]
    if what == "replaced":
        _put(cache, _kept(cache, clone=True), clone=False)
        _step(model, cache, [20])
        _step(model, cache, [21])
    del cache
    for _ in range(3):
        other = _cache(model, kind)
        _step(model, other, [30, 31, 32, 33, 34, 35])
        for token in (40, 41, 42):
            _step(model, other, [token])
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_the_next_cache_still_takes_over_what_nothing_holds(models: Any) -> None:
    model, _, kind = models
    if kind == "cpu":
        pytest.skip("there are no captures")
    for _ in range(3):
        cache = _cache(model, kind)
        _step(model, cache, [5, 6, 7])
        for token in (9, 10, 11):
            _step(model, cache, [token])
        captures = model.forward.figures.captures
        del cache
    cache = _cache(model, kind)
    _step(model, cache, [5, 6, 7])
    for token in (9, 10, 11):
        _step(model, cache, [token])
    assert model.forward.figures.captures == captures
