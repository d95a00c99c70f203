"""Models of real shapes with random weights: the right sizes, and experts as unevenly popular as asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moestro import load, load_tokenizer
from moestro.errors import BudgetError, RequestError
from moestro.loading.build import home
from moestro.loading.random_model import _popularity
from moestro.planning.shapes import SHAPES

# What the checkpoints' own pages say, in parameters.
PARAMETERS = {"mixtral-8x7b": 46_702_792_704, "olmoe-1b-7b": 6_919_161_856, "qwen3-30b-a3b": 30_532_122_624}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_real_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name], tie_word_embeddings=False))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load(shape="tiny", threads=1, device="cpu", seed=3)


def _popularity_of(model: Any) -> torch.Tensor:
    """Measured popularity [L, E] over random tokens, mean 1 in each layer."""
    conductor = model.moestro
    counts = torch.zeros(len(conductor.spec.layers), conductor.spec.layers[0].experts)
    decide = conductor.policy.decide

    def spy(step: Any, view: Any, costs: Any) -> Any:
        for expert, tokens in step.tokens.items():
            counts[step.layer, expert] += tokens
        return decide(step, view, costs)

    conductor.policy.decide = spy
    with torch.no_grad():
        model(torch.randint(0, model.config.vocab_size, (16, 128)))
    del conductor.policy.decide
    return counts / counts.mean(1, keepdim=True)


@pytest.mark.parametrize("seed", [0, 7])
def test_routing_is_skewed_as_measured_on_mixtral(seed: int) -> None:
    """Most popular 1.35 x the mean, least 0.25 x; the most popular quarter takes 28.8 %."""
    popularity = (
        _popularity_of(load(shape="tiny", threads=1, device="cpu", seed=seed)).flatten().sort(descending=True).values
    )
    assert 1.15 < popularity[0] < 1.6
    assert 0.15 < popularity[-1] < 0.75  # a width of 64 leaves much to chance
    quarter = popularity[: len(popularity) // 4].sum() / popularity.sum()
    assert 0.27 < quarter < 0.34


def test_the_wanted_popularity_is_the_published_one() -> None:
    wanted = _popularity(32, 8).flatten().sort(descending=True).values
    total = wanted.sum()
    for experts, share in ((26, 0.124), (56, 0.254), (125, 0.535), (192, 0.789)):
        assert abs(float(wanted[:experts].sum() / total) - share) < 0.02


def test_the_same_seed_gives_the_same_model(tiny: Any) -> None:
    ids = torch.arange(9)[None]
    with torch.no_grad():
        again, other = (
            load(shape="tiny", threads=1, device="cpu", seed=3),
            load(shape="tiny", threads=1, device="cpu", seed=4),
        )
        assert torch.equal(tiny(ids).logits, again(ids).logits)
        assert not torch.equal(tiny(ids).logits, other(ids).logits)


def test_equal_bytes_come_back_after_as_many_layers_as_an_expert_has_blocks() -> None:
    SHAPES["test"] = {**SHAPES["tiny"], "intermediate_size": 192}
    try:
        model = load(shape="test", threads=1, device="cpu")
    finally:
        del SHAPES["test"]
    seen = {home(model.moestro, layer, e).numpy().tobytes() for layer in range(4) for e in range(8)}
    assert len(seen) == 8 * 3
    assert not any(p.isnan().any() for p in model.parameters())


def test_building_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(shape="tiny", threads=1, device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_the_tokenizer_spells_out_what_it_has_no_letters_for() -> None:
    tokenizer = load_tokenizer(shape="tiny")
    ids = tokenizer("Once, é!").input_ids
    assert tokenizer.decode(ids) == "Once, é!"
    assert tokenizer.decode([*ids[:2], 300]) == "On<300>"
    assert len(tokenizer) == 512


def test_refusals() -> None:
    with pytest.raises(RequestError, match="no shape 'huge'; there are: deepseek-v3"):
        load(shape="huge")
    with pytest.raises(RequestError, match="name one model"):
        load("demo", shape="tiny")
    with pytest.raises(BudgetError, match=r"the model needs 87\.0 GiB of RAM .* ram allows 1\.0 GiB"):
        load(shape="mixtral-8x7b", ram="1GiB")
