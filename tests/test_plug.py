"""Loading and generating through Transformers, against Transformers alone, on the model that ships."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moestro
from moestro import MoestroConfig, load
from moestro.decode.dense import PackedEmbedding, PackedLinear
from moestro.engine.families import expert_modules
from moestro.errors import ModelError
from moestro.planning.policies import POLICIES

DEMO = str(Path(moestro.__file__).parent / "demo")
PLACES = [
    pytest.param({"device": "cpu"}, id="cpu"),
    pytest.param({"device": "emulated", "policy": "layer-split", "gpu_memory": "16MiB"}, id="emulated-none"),
    pytest.param({"device": "emulated", "policy": "layer-split", "gpu_memory": "32MiB"}, id="emulated-third"),
    pytest.param({"device": "emulated", "policy": "layer-split"}, id="emulated-all"),
    pytest.param({"device": "cuda"}, id="cuda", marks=pytest.mark.gpu),
    pytest.param({"device": "cuda", "policy": "layer-split"}, id="cuda-layer-split", marks=pytest.mark.gpu),
]


ON_CPU = {"threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=PLACES)
def model(request: pytest.FixtureRequest) -> Any:
    loaded = load("demo", dtype="float32", threads=1, **request.param)
    yield loaded
    loaded.moestro.close()


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 4096, (batch, length))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 5), (17, 4), (1, 200)])
@torch.no_grad()
def test_logits(model: Any, reference: Any, batch: int, length: int) -> None:
    ids = _ids(batch, length)
    a, b = model(ids.to(model.device)).logits.cpu(), reference(ids).logits
    assert (a - b).norm() / b.norm() <= 1e-5


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50, "temperature": 0.8},
    "beams": {"do_sample": False, "num_beams": 4},
    "prompt-lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "static-cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.sample(12)
@pytest.mark.parametrize("how", GENERATE)
def test_generate(model: Any, reference: Any, how: str) -> None:
    ids = _ids(1, 6).repeat(1, 3)  # repeats itself, so that prompt lookup has something to find
    options = {"max_new_tokens": 12, "eos_token_id": None, **GENERATE[how]}
    texts = []
    for m in (model, reference):
        torch.manual_seed(11)
        texts.append(m.generate(ids.to(m.device), **options).cpu())
    if how == "sampling" and model.device.type != "cpu":
        assert texts[0].shape == texts[1].shape  # other generators of random numbers
    else:
        assert torch.equal(*texts)


def test_a_batch_with_padding(model: Any, reference: Any) -> None:
    ids, mask = _ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, pad in enumerate((0, 2, 5)):
        ids[row, :pad], mask[row, :pad] = 2, 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    a = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **options).cpu()
    assert torch.equal(a, reference.generate(ids, attention_mask=mask, **options))


def test_layer_split_runs_its_layers_where_it_says() -> None:
    options: dict[str, Any] = {"threads": 1, "device": "emulated", "policy": "layer-split"}
    needed = load("demo", **options).moestro.gpu_plan.needed_bytes
    model = load("demo", gpu_memory=needed + 10 * 2**20, **options)
    conductor = model.moestro
    layer_bytes = 8 * conductor.spec.layers[0].expert_bytes
    assert conductor.policy.first_gpu_layer == 6 - 10 * 2**20 // layer_bytes == 4
    assert conductor.store.n_bytes == 4 * layer_bytes  # held experts have no copy in RAM
    assert conductor.slots.memory.numel() == 2 * layer_bytes <= 10 * 2**20
    model.generate(_ids(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert conductor.counters.hits == 2 * 2 * 3  # two layers, top-2, three decode steps
    assert conductor.counters.misses == 4 * 2 * 3
    assert conductor.counters.moved_bytes == 0
    conductor.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@torch.no_grad()
def test_dtypes_agree_with_transformers_in_the_same_dtype(dtype: str) -> None:
    """In half precision the reference itself rounds: both stay near it in float32, ours about as much."""
    ids = _ids(2, 100)
    exact = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype=getattr(torch, dtype))(ids).logits.float()
    model = load("demo", dtype=dtype, **ON_CPU)
    assert model.dtype == getattr(torch, dtype)
    assert model.moestro.math[0].format.name == {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    ours = model(ids).logits.float()
    # The median token: rounding may send a token to another expert, which is no error of arithmetic.
    error, theirs_error = (((x - exact).norm(dim=-1) / exact.norm(dim=-1)).median() for x in (ours, theirs))
    assert error <= max(1e-5, 2 * theirs_error), f"{error:.2e} against {theirs_error:.2e}"


def test_auto_dtype_is_the_checkpoints() -> None:
    assert load("demo", **ON_CPU).dtype == torch.bfloat16
    assert load("demo", dtype=torch.float16, **ON_CPU).dtype == torch.float16


@torch.no_grad()
def test_the_plain_transformers_line(reference: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, quantization_config=MoestroConfig(device="cpu"), experts_implementation="moestro"
    )
    ids = _ids(2, 9)
    assert (model(ids).logits - reference(ids).logits).norm() / reference(ids).logits.norm() <= 1e-5
    assert model.moestro.counters.layer_steps == 6


def test_nothing_is_left_behind(model: Any) -> None:
    assert expert_modules(model)
    assert not any("experts" in name for name, _ in model.named_parameters())
    assert not any(p.device.type == "meta" for p in [*model.parameters(), *model.buffers()])
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())


def test_expert_tensors_stay_off_the_gpu_while_loading() -> None:
    """Converters of experts run on the CPU, also where a family has none of its own (gpt_oss)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from families import FAMILIES, build_config
    from moestro.loading.plug import MoestroQuantizer

    for family in (f for f in FAMILIES if f.name in ("mixtral", "gpt_oss", "granitemoe", "nemotron_h")):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(build_config(family))
        quantizer = MoestroQuantizer(MoestroConfig(device="cpu"), pre_quantized=False)
        quantizer.preprocess_model(model)
        converters = [c for c in get_model_conversion_mapping(model, None, quantizer) if hasattr(c, "force_cpu")]
        for name, _ in model.named_parameters():
            if quantizer.param_needs_quantization(model, name):
                assert quantizer.param_element_size(model, name, torch.empty(1)) == 0
                suits = [c for c in converters if any(name.endswith(t) for t in c.target_patterns)]
                assert suits, name
                assert all(c.force_cpu for c in suits), name
            else:
                assert not [c for c in converters if c.force_cpu and c.compiled_sources.search(name)], name
                assert quantizer.param_element_size(model, name, torch.empty(1)) == 4


@torch.no_grad()
def test_our_experts_function_without_our_config_is_refused() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, experts_implementation="moestro")
    with pytest.raises(ModelError, match=r"needs quantization_config=MoestroConfig"):
        model(_ids(1, 3))


def test_every_policy_has_a_docstring_that_says_what_it_is() -> None:
    for name, policy in POLICIES.items():
        module = __import__(policy.__module__, fromlist=["__doc__"])
        assert module.__doc__.startswith(f"`{name}`")


def test_two_models_at_once_do_not_share_experts(reference: Any) -> None:
    a, b = load("demo", dtype="float32", **ON_CPU), load(shape="tiny", **ON_CPU)
    ids = _ids(1, 5)
    with torch.no_grad():
        b(ids % 512)
        assert torch.equal(a(ids).logits, load("demo", dtype="float32", **ON_CPU)(ids).logits)
    assert a.moestro.counters.layer_steps == 6
    assert b.moestro.counters.layer_steps == 4


def test_a_model_gives_its_memory_back_when_it_goes() -> None:
    """Without waiting for the garbage collector: the next model needs the room."""
    gc.collect()
    gc.disable()
    try:
        model = load("demo", **ON_CPU)
        store = weakref.ref(model.moestro.store)
        del model
        assert store() is None
    finally:
        gc.enable()


def test_gradients_are_refused_and_not_wrong(reference: Any) -> None:
    model = load("demo", dtype="float32", **ON_CPU)
    assert not any(p.requires_grad for p in model.parameters())
    embeds = model.get_input_embeddings()(_ids(1, 3)).requires_grad_()
    with pytest.raises(ModelError, match="Moestro is for inference"):
        model(inputs_embeds=embeds)


def test_what_cannot_be_done_says_so() -> None:
    model = load("demo", **ON_CPU)
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ModelError, match="cannot be copied or pickled"):
            action(model.moestro)


def test_tied_embeddings_count_once_in_the_plan() -> None:
    model = load("demo", **ON_CPU)
    packed = [m.matrix.packed for m in model.modules() if isinstance(m, PackedLinear | PackedEmbedding)]
    tensors = [*model.parameters(), *model.buffers(), *packed]
    dense = {p.data_ptr(): p.numel() * p.element_size() for p in tensors}
    assert model.moestro.spec.dense_bytes == sum(dense.values())


def test_the_gpu_budget_holds_where_layers_have_experts_of_two_sizes(tmp_path: Path) -> None:
    from families import FAMILIES, build_model

    family = next(f for f in FAMILIES if f.name == "ernie4_5_vl_moe")
    sizes = {**family.config, "moe_intermediate_size": [200, 16]}
    build_model(dataclasses.replace(family, config=sizes)).save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": "emulated", "policy": "layer-split", "threads": 1}
    needed = load(str(tmp_path), **options).moestro.gpu_plan.needed_bytes
    conductor = load(str(tmp_path), gpu_memory=needed + 900_000, **options).moestro
    assert len({layer.expert_bytes for layer in conductor.spec.layers}) == 2
    assert 0 < conductor.slots.memory.numel() <= 900_000
    conductor.close()
