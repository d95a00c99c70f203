"""Steps of several sequences, or of several new tokens of one, go the fused way and compute what each would alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from families import EXPERTS, save_model
from moestro import load
from moestro.compute.cpu import levels
from moestro.decode.cpu.masks import MOST_TOKENS, seen_in, trial_mask

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 2, "dtype": "float32"}
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
STRETCHES = ["mixtral", "olmoe", "qwen3_moe"]


def calls_of(model: Any) -> list[int]:
    """Grows by the tokens of each step that goes the fused way, at its first layer."""
    tokens = list[int]()
    layer = model.model.layers[0].forward
    kernel = layer.kernel if layer._together is None else layer._together.func.__self__._kernel
    run = kernel.run

    def noted(x: Tensor, *rest: Any) -> Any:
        tokens.append(x.shape[0] * x.shape[1])
        return run(x, *rest)

    kernel.run = noted
    return tokens


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Random ids padded on the left, and their mask, both [B, longest]."""
    longest = max(lengths)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    return torch.randint(3, 100, mask.shape) * mask, mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.sample(4)
@needs_kernels
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*STRETCHES, "qwen2_moe"])  # which has a shared expert: layer by layer
@torch.no_grad()
def test_a_step_of_padded_sequences(family: str, attention: str, tmp_path: Path) -> None:
    """Each new step's logits against Transformers' own layers and against each sequence alone; counters, too."""
    save_model(family, tmp_path, HEADS | {"num_hidden_layers": 3})
    fused, plain = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    for model in (fused, plain):
        model.set_attn_implementation(attention)
    fused = load(str(tmp_path), **ON_CPU) if attention == "sdpa" else eager(tmp_path)
    tokens, lengths = calls_of(fused), [9, 4, 1, 6]
    ids, mask = padded(lengths)
    caches = DynamicCache(), DynamicCache()
    alone = [DynamicCache() for _ in lengths]
    for model, cache in zip((fused, plain), caches, strict=True):
        model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    for cache, row, length in zip(alone, ids, lengths, strict=True):
        plain(row[None, -length:], past_key_values=cache)
    for new in (1, 1, 3, 1, 4):
        more = torch.randint(3, 100, (len(lengths), new))
        mask = torch.cat((mask, torch.ones_like(more)), 1)
        place = positions(mask)[:, -new:]
        before = [replace(model.moestro.counters) for model in (fused, plain)]
        pairs = zip((fused, plain), caches, strict=True)
        a, b = (m(more, attention_mask=mask, position_ids=place, past_key_values=c).logits for m, c in pairs)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        done = [model.moestro.counters for model in (fused, plain)]
        for name in ("layer_steps", "misses", "tokens"):
            ours, theirs = (getattr(x, name) - getattr(y, name) for x, y in zip(done, before, strict=True))
            assert ours == theirs > 0
        each = [plain(row[None], past_key_values=c).logits[0] for row, c in zip(more, alone, strict=True)]
        torch.testing.assert_close(a, torch.stack(each), rtol=1e-4, atol=1e-4)
        assert tokens.pop() == len(lengths) * new
        assert not tokens


def eager(path: Path) -> Any:
    """A model that was fused with Transformers' eager attention, whose masks are floats."""
    from transformers import AutoModelForCausalLM

    from moestro.loading.config import MoestroConfig

    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=MoestroConfig(device="cpu", threads=2),
        experts_implementation="moestro",
    )


@needs_kernels
@pytest.mark.parametrize("family", STRETCHES)
@torch.no_grad()
def test_a_row_has_the_bits_that_it_has_alone(family: str, tmp_path: Path) -> None:
    """Whatever is in the step beside it: random companions, up to as many tokens as a step has."""
    save_model(family, tmp_path, HEADS | {"num_hidden_layers": 3})
    model = load(str(tmp_path), **ON_CPU | {"bits": 4})
    tokens, past = calls_of(model), torch.randint(3, 100, (1, 70))

    def logits_of(ids: Tensor, sequences: int) -> Tensor:
        """Of new tokens [1 or B, N] behind the same ones."""
        cache = DynamicCache()
        model(past, past_key_values=cache)
        cache.batch_repeat_interleave(sequences)
        found: Tensor = model(ids, past_key_values=cache).logits
        return found

    row = torch.randint(3, 100, (1, 1))
    wanted = logits_of(row, 1)[0]
    tokens.clear()
    for others in (1, 4, 15, 16, 31, MOST_TOKENS - 1):
        batch = torch.cat((row, torch.randint(3, 100, (others, 1))))
        assert torch.equal(logits_of(batch, others + 1)[0], wanted), others
        several = torch.cat((row, torch.randint(3, 100, (1, others))), 1)
        assert torch.equal(logits_of(several, 1)[0, :1], wanted), others
    assert [count for count in tokens if count != 70] == [
        n for others in (1, 4, 15, 16, 31, MOST_TOKENS - 1) for n in [others + 1] * 2
    ]


@needs_kernels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_a_step_of_sequences_in_16_bits(dtype: str, tmp_path: Path) -> None:
    # Every token to every expert: in 16 bits, a tie between two routes may fall either way.
    save_model("olmoe", tmp_path, HEADS | {"num_experts_per_tok": EXPERTS})
    fused, plain = (load(str(tmp_path), fuse=on, **ON_CPU | {"dtype": dtype}) for on in (True, False))
    tokens, tolerance = calls_of(fused), {"float16": 1e-2, "bfloat16": 6e-2}[dtype]
    ids, caches = torch.randint(3, 100, (8, 5)), (DynamicCache(), DynamicCache())
    for count in (5, 1, 2, 1):
        ids = torch.randint(3, 100, (8, count))
        a, b = (m(ids, past_key_values=c).logits.float() for m, c in zip((fused, plain), caches, strict=True))
        assert (a - b).norm() <= tolerance * b.norm()
    assert tokens == [8, 16, 8]


@pytest.mark.sample(4)
@needs_kernels
@pytest.mark.parametrize("family", STRETCHES)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 4}],
    ids=["batch", "beams", "two beams each", "prompt lookup"],
)
def test_generation_of_several_rows_equals_transformers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    save_model(family, tmp_path, HEADS, sliding_window=None)
    fused, plain = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    tokens = calls_of(fused)
    is_alone = "prompt_lookup_num_tokens" in options
    ids, mask = padded([8] if is_alone else [7, 3])
    if is_alone:
        ids = ids.repeat(1, 3)
        mask = torch.ones_like(ids)
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(ids, **given, **options) for model in (fused, plain)]
    assert torch.equal(*texts)
    assert len(tokens) >= 3
    assert max(tokens) > 1


@needs_kernels
@torch.no_grad()
def test_a_mask_that_says_more_goes_transformers_way(tmp_path: Path) -> None:
    """A hole in what a token sees, padding on the right, and more tokens than a step has."""
    save_model("olmoe", tmp_path, HEADS)
    fused, plain = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    tokens = calls_of(fused)
    for mask, new in (
        (torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2), 1),
        (torch.tensor([[1, 1, 1, 1, 1, 1, 0]] * 2), 1),
        (torch.ones(1, 6 + MOST_TOKENS + 1, dtype=torch.long), MOST_TOKENS + 1),
    ):
        ids, caches = torch.randint(3, 100, (len(mask), 6)), (DynamicCache(), DynamicCache())
        more = torch.randint(3, 100, (len(mask), new))
        for model, cache in zip((fused, plain), caches, strict=True):
            model(ids, attention_mask=mask[:, :6], past_key_values=cache)
        pairs = zip((fused, plain), caches, strict=True)
        a, b = (m(more, attention_mask=mask, past_key_values=c).logits for m, c in pairs)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not tokens


def test_masks_are_read_as_they_were_made() -> None:
    """Against each token looked up one by one; any other mask than such a one is told."""
    for _ in range(200):
        sequences, new = int(torch.randint(1, 5, ())), int(torch.randint(1, 5, ()))
        length = new + int(torch.randint(0, 9, ()))
        firsts = torch.randint(0, length - new + 1, (sequences,)).tolist()
        for implementation in ("sdpa", "eager"):
            mask = trial_mask(implementation, torch.float32, firsts, new, length)
            assert mask is not None
            found = seen_in(mask, sequences, new, length)
            wanted = [[first, length - new + 1 + each] for first in firsts for each in range(new)]
            assert found is not None
            assert found.tolist() == wanted
            at = tuple(int(torch.randint(0, size, ())) for size in mask.shape)
            mask[at] = ~mask[at] if mask.dtype == torch.bool else -0.5
            changed = seen_in(mask, sequences, new, length)
            # A token more or less at the beginning is another mask of the kind, unless it hides the token itself.
            if changed is not None:
                first, end = changed.tolist()[at[0] * new + at[2]]
                assert mask.dtype == torch.bool
                assert end == wanted[at[0] * new + at[2]][1]
                assert abs(first - firsts[at[0]]) == 1
    assert seen_in(torch.ones(1, 1, 1, 4, dtype=torch.int64), 1, 1, 4) is None
    assert seen_in(torch.ones(1, 1, 1, 3, dtype=torch.bool), 1, 1, 4) is None
