"""Small models of drawn configurations on the CPU with all that is fused, against Transformers: prefill and decode.

What is drawn is what a fused layer could take for something that it is not: head counts and widths, gated queries,
partial rotary embeddings, odd widths, biases, norms of queries and keys, shared experts, tied embeddings.
"""

from __future__ import annotations

import inspect
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import FAMILIES, VOCABULARY, build_model
from moestro import load
from moestro.compute.cpu import levels

pytestmark = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")

# Those whose attention is fused where its heads are wide enough, and some that nearly look like it.
FUSABLE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoeshared", "solar_open", "phimoe")
OTHERS = (
    *("qwen3_next", "glm4_moe", "ernie4_5_moe", "gpt_oss", "minimax_m2", "deepseek_v3", "dots1", "flex_olmo"),
    "hunyuan_v1_moe",  # its norms of queries and keys come after the rotary embedding
)
MORE = ("granitemoe", "deepseek_v2", "exaone_moe", "qwen3_5_moe_text")
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # what sharp scores make of roundings; a wrong part shows as more
NOISE = {"float32": 2**-16, "bfloat16": 2**-10}  # above the rounding errors of what is compared
MOST_AMPLIFIED = {"float32": 200, "bfloat16": 20}  # beyond it, roundings alone reach the tolerance
FUSED: Counter[str] = Counter()
TRIED: Counter[str] = Counter()


def draw_config(draw: Any, known: set[str], all_experts: bool) -> dict[str, Any]:
    """Values for those of a configuration's fields that it has."""
    groups, shared = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 4)))
    head = draw(st.sampled_from((8, 16, 16, 24, 32, 48, 64)))
    heads, layers, experts = groups * shared, draw(st.integers(1, 3)), draw(st.integers(2, 8))
    own_width = "head_dim" in known
    hidden = draw(st.sampled_from((33, 48, 64, 70, 96))) if own_width and draw(st.booleans()) else heads * head
    kinds = [draw(st.sampled_from(("linear_attention", "full_attention"))) for _ in range(layers - 1)]
    rotary = {"rope_type": "default", "rope_theta": 1e4}
    if draw(st.booleans()):
        rotary["partial_rotary_factor"] = draw(st.sampled_from((0.25, 0.5, 0.75, 1.0)))
    width = st.sampled_from((24, 40, 64, 70, 130))
    values = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "num_hidden_layers": layers,
        "layer_types": [
            *(kinds if "linear_num_key_heads" in known else ["full_attention"] * (layers - 1)),
            "full_attention",
        ],
        "mlp_layer_types": ["sparse"] * layers,
        "mlp_only_layers": [0] if layers > 1 and draw(st.booleans()) else [],
        "rope_parameters": rotary,
        "num_experts": experts,
        "intermediate_size": draw(width),
        "moe_intermediate_size": draw(width),
        **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), draw(width)),
        **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), draw(st.integers(1, 2))),
        **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), experts),
        **dict.fromkeys(("n_group", "topk_group"), 1),
        "attention_multiplier": draw(st.sampled_from((1 / head, head**-0.5))),  # of Granite, whose default is 1
        **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), draw(st.integers(0, layers - 1))),
        **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_bias", "qkv_bias"), draw(st.booleans())),
        **dict.fromkeys(("use_qk_norm", "norm_topk_prob", "attn_output_gate"), draw(st.booleans())),
    }
    top_k = experts if all_experts else draw(st.integers(1, experts))
    values |= dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), top_k)
    return {key: value for key, value in values.items() if key in known}


def check(name: str, data: st.DataObject) -> None:
    # Phi's router takes two experts whatever it is told, and in 16 bits a tie between two may fall either way.
    dtype = data.draw(st.sampled_from(("float32", "float32", "float32" if name == "phimoe" else "bfloat16")))
    family = next(f for f in FAMILIES if f.name == name)
    known = set(inspect.signature(CONFIG_MAPPING[family.model_type or family.name].__init__).parameters)
    # Of the others, every token goes to every expert then.
    config = {**family.config, **data.draw(st.composite(lambda draw: draw_config(draw, known, dtype == "bfloat16"))())}
    if "q_lora_rank" in known or "kv_lora_rank" in known:  # heads of two parts, each with a width of its own
        config["num_key_value_heads"] = config["num_attention_heads"]
        config.pop("head_dim", None)
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    ids = torch.randint(3, VOCABULARY - 3, (1, data.draw(st.integers(2, 12)) + 4), generator=random)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            at_any_width(build_model(replace(family, config=config))).save_pretrained(folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            theirs.set_experts_implementation("eager")  # the grouped one takes no odd widths in 16 bits
            wanted = steps(theirs, ids)
            exact = steps(theirs.float(), ids)  # the same in float32, but for layers that compute in their own type
            if (largest := amplification(theirs, ids, exact, NOISE[dtype])) > MOST_AMPLIFIED[dtype]:
                event(f"{name}: of this model any rounding makes another one, {largest:.0f} times as large")
                return
        except Exception as error:  # what Transformers itself cannot run: a rotary embedding that its family has not
            event(f"{name}: not in Transformers: {type(error).__name__}")
            return
        ours = load(folder, device="cpu", threads=data.draw(st.integers(1, 2)), dtype=dtype)
        FUSED[name] += any(type(m.forward).__name__ == "FusedAttention" for m in ours.modules())
        TRIED[name] += 1
        for got, theirs_got, right in zip(steps(ours, ids), wanted, exact, strict=True):
            # What is rounded to 16 bits may be off by more than Transformers is, but not by much more.
            most = TOLERANCE[dtype] * float(right.norm()) + 2 * float((theirs_got - right).norm())
            assert got.isfinite().all()
            assert float((got - right).norm()) <= most, (name, dtype, config)


def at_any_width(model: Any) -> Any:
    """Weights smaller where they are many, so that scores are no sharper than in the small models of other tests.

    Else one key takes all, bfloat16 rounds another one to the top, and Transformers' own logits are off by a tenth to
    a half of themselves: nothing could be told from ours.
    """
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(min(1.0, (32 / weight.shape[-1]) ** 0.5))
    return model


def steps(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits of a prompt, and of four tokens behind it one by one."""
    cache, ends = DynamicCache(config=model.config), [0, *range(ids.shape[1] - 4, ids.shape[1] + 1)]
    parts = [ids[:, start:stop] for start, stop in pairwise(ends)]
    return [model(part, past_key_values=cache, use_cache=True).logits.float() for part in parts]


def amplification(model: Any, ids: Tensor, exact: list[Tensor], noise: float) -> float:
    """By how much larger a relative noise of the embeddings comes out of the logits.

    Two to five times in most models. It is hundreds where a score is near a tie, or a recurrent state near zero is
    normed: there Transformers' own code, run with other roundings, gives other logits.
    """
    changes = []
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)

        def shake(_module: Any, _given: Any, out: Tensor, random: torch.Generator = random) -> Tensor:
            return out * (1 + noise * torch.randn(out.shape, generator=random))

        hook = model.get_input_embeddings().register_forward_hook(shake)
        changes += [float((a - b).norm() / b.norm()) for a, b in zip(steps(model, ids), exact, strict=True)]
        hook.remove()
    return max(changes) / noise


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors]


PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking takes minutes: a model is small anyway


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", [*FUSABLE, *OTHERS])
@settings(max_examples=2, deadline=None, suppress_health_check=QUIET, phases=PHASES)
@given(data=st.data())
def test_drawn_configurations_give_the_same_logits(name: str, data: st.DataObject) -> None:
    check(name, data)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*FUSABLE, *OTHERS, *MORE])
def test_many_drawn_configurations_give_the_same_logits(name: str) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=QUIET, phases=PHASES)
    @given(data=st.data())
    def check_one(data: st.DataObject) -> None:
        check(name, data)

    check_one()
    assert TRIED[name] >= 20
    assert FUSED[name] >= 5 or name not in FUSABLE  # or it would be Transformers that is tested
