"""A prompt's attention in the kernels: against torch's, against its tokens one by one, and in whole models."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from families import save_model
from moestro import load
from moestro.compute.cpu import levels
from moestro.compute.few_tokens import StepAttention
from moestro.decode.cpu.attention import FusedAttention
from moestro.decode.cpu.masks import MOST_TOKENS
from moestro.memory.formats import MATRIX_FORMATS
from packing import pack_matrix

LEVELS = [name for name, usable in levels().items() if usable]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 2, "dtype": "float32"}
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
pytestmark = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")


def attention_of(
    heads: int, groups: int, head: int, dtype: torch.dtype, level: str = "", threads: int = 2
) -> StepAttention:
    q, k, v = (pack_matrix(MATRIX_FORMATS["fp32"], torch.zeros(n * head, 16)) for n in (heads, groups, groups))
    return StepAttention((q, k, v), (None, None), head=head, scaling=0.2, dtype=dtype, threads=threads, level=level)


def attend(kernel: StepAttention, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """As `StepAttention.attend`, into an output that was all NaN."""
    out = torch.full_like(query, torch.nan)
    kernel.kernel.attend(kernel.runner, kernel.level, query, keys, values, seen, out)
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("heads", "groups", "head", "new", "past"),
    [(6, 2, 32, 150, 437), (3, 3, 48, 97, 0), (8, 1, 16, 70, 600), (4, 2, 32, 32, 530)],
)
def test_a_prompt_against_torch(
    level: str, dtype: torch.dtype, heads: int, groups: int, head: int, new: int, past: int
) -> None:
    """Two sequences of which one is padded on the left, up into the prompt itself where nothing was before it.

    What no token sees is NaN, and so is what lies between the heads.
    """
    length = new + past
    room = torch.full((2, 2, groups, length + 3, head), torch.nan, dtype=dtype)
    room[:, :, :, :length] = torch.randn(2, 2, groups, length, head).to(dtype)
    firsts = torch.tensor([0, past + 9 if past == 0 else past - 5])
    room[:, 1, :, : firsts[1]] = torch.nan
    keys, values = room[0, :, :, :length], room[1, :, :, :length]
    query = torch.randn(2 * new, heads * head).to(dtype)
    ends = torch.arange(past + 1, length + 1).repeat(2)
    seen = torch.stack((firsts.repeat_interleave(new), ends), 1)
    seen[seen[:, 0] >= ends] = 0
    kernel = attention_of(heads, groups, head, dtype, level)
    got = attend(kernel, query, keys, values, seen)
    for b, first in enumerate(firsts.tolist()):
        real = max(0, first - past)  # tokens before it are padding
        by_heads = query.view(2, new, heads, head)[b, real:].transpose(0, 1)[None].double()
        mask = torch.ones(new - real, length - first, dtype=torch.bool).tril(length - first - new + real)
        part = [each[b : b + 1, :, first:].double() for each in (keys, values)]
        wanted = scaled_dot_product_attention(by_heads, *part, attn_mask=mask, scale=0.2, enable_gqa=True)
        ours = got.view(2, new, heads, head)[b, real:].transpose(0, 1).double()
        assert (ours - wanted[0]).norm() <= TOLERANCES[dtype] * wanted.norm()
    assert not got[(seen == 0).all(1)].any()
    for t in (new - 1, 2 * new - 1, int(torch.randint(new, 2 * new, ()))):  # as in a step of its own
        b = t // new
        alone = attend(kernel, query[t : t + 1], keys[b : b + 1], values[b : b + 1], seen[t : t + 1])
        assert (alone[0] - got[t]).norm() <= TOLERANCES[dtype] * got[t].norm()
        assert torch.equal(alone[0], got[t]) or 2 * new > MOST_TOKENS
    assert torch.equal(
        attend(attention_of(heads, groups, head, dtype, level, threads=3), query, keys, values, seen), got
    )


def test_what_a_later_token_holds_reaches_no_earlier_one() -> None:
    """A value that is infinite, at the end of a prompt, is not multiplied by 0."""
    keys, values, query = torch.randn(1, 1, 90, 16), torch.randn(1, 1, 90, 16), torch.randn(90, 16)
    values[:, :, 89] = torch.inf
    ends = torch.arange(1, 91)
    out = attend(attention_of(1, 1, 16, torch.float32), query, keys, values, torch.stack((ends * 0, ends), 1))
    assert out[:89].isfinite().all()
    assert not out[89].isfinite().any()


def prompts_of(model: Any) -> list[int]:
    """Grows by the tokens of each call of the kernel in the first layer."""
    fused = model.model.layers[0].self_attn.forward
    assert isinstance(fused, FusedAttention)
    tokens, attends = list[int](), fused.kernel.attend

    def noted(query: Tensor, *rest: Any) -> Tensor:
        tokens.append(len(query))
        return attends(query, *rest)

    fused.kernel.attend = noted  # type: ignore[method-assign]
    return tokens


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe"])
@torch.no_grad()
def test_a_padded_prompt_in_chunks_equals_transformers(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path, HEADS | {"num_hidden_layers": 2})
    fused, plain = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    tokens = prompts_of(fused)
    lengths, longest = [250, 21, 234], 250  # a chunk may be longer than the room that a cache keeps
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    ids, places = torch.randint(3, 100, mask.shape) * mask, (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = plain(ids, attention_mask=mask, position_ids=places).logits
    for sizes in ([250], [20, 230], [229, 21], [140, 3, 107]):
        cache, parts, at = DynamicCache(), list[Tensor](), 0
        for size in sizes:
            now = slice(at, at + size)
            given = {"attention_mask": mask[:, : at + size], "position_ids": places[:, now], "past_key_values": cache}
            parts.append(fused(ids[:, now], **given).logits)
            at += size
        torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], wanted[mask == 1], rtol=1e-4, atol=1e-4)
        assert tokens[0] == 3 * sizes[0]
        tokens.clear()
    one = torch.randint(3, 100, (1, 60))  # whose mask is left out
    a, b = (model(one, past_key_values=DynamicCache()).logits for model in (fused, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert tokens == [60]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
def test_a_long_call_stops_at_once() -> None:
    """Attention that would take seconds; afterwards the same threads compute as before."""
    kernel = attention_of(32, 4, 128, torch.float32)
    query, keys = torch.randn(3000, 32 * 128), torch.randn(2, 1, 4, 30000, 128)
    few = query[:2].clone()
    before = kernel.attend(few, *keys[:, :, :, :100])

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)
    start_s = perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        kernel.attend(query, keys[0], keys[1])
    assert perf_counter() - start_s < 1
    assert torch.equal(kernel.attend(few, *keys[:, :, :, :100]), before)


def longest_step(model: Any) -> list[int]:
    """Grows by the tokens of each call of the first layer's experts."""
    steps = list[int]()
    model.moestro.progress = lambda layer, tokens: steps.append(tokens) if layer == 0 else None
    return steps


@torch.no_grad()
def test_an_expert_crosses_the_link_once_a_chunk(tmp_path: Path) -> None:
    """On a device with room for few of the experts, for prompts in chunks of several sizes."""
    save_model("olmoe", tmp_path, HEADS | {"num_hidden_layers": 2})
    model = load(str(tmp_path), device="emulated", policy="lru", gpu_memory="8MiB", threads=1, dtype="float32")
    conductor, ids = model.moestro, torch.randint(3, 100, (1, 400))
    greedy = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, **greedy)
    for chunk in (100, 150, 370):
        conductor.gpu_plan = replace(conductor.gpu_plan, chunk=chunk)
        before, steps = conductor.counters.moved_bytes, longest_step(model)
        assert torch.equal(model.generate(ids, **greedy), whole)
        assert steps == [len(part) for part in ids[0].split(chunk)]
        assert conductor.counters.moved_bytes - before <= conductor.spec.expert_bytes * len(steps)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="watches /proc")
def test_the_memory_of_a_prompt_is_that_of_a_chunk(tmp_path: Path) -> None:
    """A process's peak while prompts are read: little more for a longer one in chunks, a lot where it is read whole."""
    sizes = {"num_hidden_layers": 1, "intermediate_size": 640, "max_position_embeddings": 2**15}
    save_model("mixtral", tmp_path, HEADS | sizes)
    code = f"""
import re, torch
from moestro import load
from moestro.engine import chunks
model = load({str(tmp_path)!r}, device="cpu", threads=2, dtype="float32")
in_chunks = chunks.ram_chunk
for tokens, find in ((2100, in_chunks), (6000, in_chunks), (6000, lambda *_: 1 << 30)):
    chunks.ram_chunk = find
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew
    model.generate(torch.randint(3, 100, (1, tokens)), max_new_tokens=1, do_sample=False, eos_token_id=None)
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    short, long, whole = map(int, done.stdout.split())
    assert whole - long > 25e6
    assert long - short < (whole - long) / 2.5
