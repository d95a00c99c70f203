"""Captured decode steps: the same numbers as Transformers' own code, which then does not run.

On the CPU with pretended graphs, and on a GPU where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from weakref import ref

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from families import FAMILIES as EVERY_FAMILY
from families import INSTALLED, VOCABULARY, Family, save_model
from moestro import load, load_tokenizer
from moestro.decode.capture import CapturedSteps, StepCache, cache_for
from moestro.decode.capture.capture import Cut
from moestro.devices.graphs import CannotCaptureError, CudaGraphs, PretendedGraphs
from moestro.loading.build import conduct_by
from moestro.planning.contract import Step
from moestro.planning.policies import make_policy
from moestro.planning.timeline import Timeline
from moestro.text.chat import ChatSession
from moestro.text.generation import TextOptions, generate_text
from moestro.text.tracing import listening

DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
FULL = {"sliding_window": None}
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
# With recurrent or indexed layers, or without a static cache in Transformers.
# fmt: off
NOT_CAPTURED = frozenset((
    "aria", "aria_text", "axk2", "bailing_hybrid", "deepseek_v32", "deepseek_v4", "dots3_note",
    "dots3_note_text", "ernie4_5_vl_moe", "glm5_next", "glm_moe_dsa", "granitemoehybrid", "hy_v4", "inkling",
    "inkling_text", "inkling2", "inkling2_text", "jamba", "kimi_linear", "lfm2_moe", "minimax", "minimax_m3_vl",
    "minimax_m3_vl_text", "mistral_large4", "nemotron_h", "nemotron_h_latent", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "unlimited_ocr", "zaya",
))
# fmt: on
FEW, HALF = "400KiB", "560KiB"  # for a handful of 24 experts, and about half of them


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small models on disk, by family and sizes."""
    made: dict[str, Path] = {}

    def folder(family: str, sizes: dict[str, Any]) -> Path:
        key = f"{family} {sizes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            save_model(family, made[key], sizes)
        return made[key]

    return folder


@contextmanager
def _loaded(folder: Path | str, device: str, *, fuse: bool, policy: str = "lru", gpu: str = HALF) -> Iterator[Any]:
    memory = None if device == "cuda" else gpu  # there it holds the dense part as well
    model = load(
        str(folder), device=device, policy=policy, gpu_memory=memory, threads=1, dtype="float32", fuse=fuse, seed=0
    )
    assert isinstance(model.forward, CapturedSteps) == fuse
    try:
        yield model
    finally:
        model.moestro.close()


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 28, (batch, length))


def _generate(model: Any, ids: Tensor, seed: int = 3, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits of each."""
    torch.manual_seed(seed)
    if "past_key_values" not in options:
        options["cache_implementation"] = "static"
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 14, **GREEDY, **options}
    moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    output = model.generate(ids.to(model.device), **moved)
    return output.sequences.cpu(), torch.cat([step.cpu() for step in output.logits])


def _same(ours: Any, theirs: Any, device: str, exact: bool = True) -> None:
    """exact: not where a policy decides by the wall clock what the CPU computes."""
    assert torch.equal(ours[0], theirs[0])
    if exact and device == "emulated":
        assert torch.equal(ours[1], theirs[1])  # the same operations on the same numbers
    else:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


# With full attention alone; windows that fill in the middle of the text; latent attention; shared experts; sinks.
TRIED: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", FULL),
    ("mixtral", {"sliding_window": 9}),
    ("qwen3_moe", {}),
    ("olmoe", {}),
    ("deepseek_v3", {}),
    ("gpt_oss", {}),
    ("qwen2_moe", {}),
]


@pytest.mark.sample(6)
@pytest.mark.parametrize(("family", "sizes"), TRIED, ids=lambda value: value if isinstance(value, str) else "")
def test_families(family: str, sizes: dict[str, Any], device: str, folders: Any) -> None:
    for batch in (1, 3):
        ids, results = _ids(batch, 5), []
        for fuse in (True, False):
            with _loaded(folders(family, sizes), device, fuse=fuse) as model:
                cache = StepCache(model.config, 32)  # in which a full window can be captured on a GPU
                results.append(_generate(model, ids, past_key_values=cache))
                if fuse:
                    assert model.forward.figures.replays >= 9
        _same(*results, device)


@pytest.mark.sample(16)
@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_every_family_is_captured_or_says_why_not(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(family.name, tmp_path)
    ids = _ids(1, 4)
    with (
        _loaded(tmp_path, "emulated", fuse=True, policy="cpu-only", gpu="100MiB") as model,
        caplog.at_level(logging.WARNING, "moestro"),
    ):
        cache = cache_for(model, None, 16)
        assert (cache is None) == (family.name in NOT_CAPTURED)
        assert any("cannot be captured" in capture.getMessage() for capture in caplog.records) == (cache is None)
        if cache is not None:
            captured = _generate(model, ids, past_key_values=cache, max_new_tokens=12)
            assert model.forward.figures.replays >= 7
            eager = _generate(model, ids, past_key_values=None, max_new_tokens=12)
            assert torch.equal(captured[0], eager[0])
            torch.testing.assert_close(captured[1], eager[1], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(Version("5.23") > INSTALLED, reason="an older Transformers has fewer families")
def test_the_readme_counts_them() -> None:
    assert (len(EVERY_FAMILY), len(EVERY_FAMILY) - len(NOT_CAPTURED)) == (72, 39)


@pytest.mark.parametrize("gpu", [FEW, HALF])
@pytest.mark.parametrize("policy", ["lru", "moestro", "lru-speculative", "layer-streaming"])
def test_policies(policy: str, gpu: str, device: str, folders: Any) -> None:
    ids, results, counted = _ids(1, 6), [], []
    for fuse in (True, False):
        with _loaded(folders("olmoe", {}), device, fuse=fuse, policy=policy, gpu=gpu) as model:
            results.append(_generate(model, ids))
            counted.append((model.moestro.counters.layer_steps, model.moestro.counters.tokens))
    _same(*results, device, exact=policy == "lru")
    assert counted[0] == counted[1]


def test_transformers_code_runs_only_until_it_is_captured(device: str, folders: Any) -> None:
    with _loaded(folders("olmoe", {}), device, fuse=True) as model:
        calls, phases = [], []
        attention, begin = model.model.layers[1].self_attn, model.moestro.begin
        forward = attention.forward
        attention.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
        model.moestro.begin = lambda info: phases.append((info.tokens, info.phase.name)) or begin(info)
        _generate(model, _ids(1, 6), max_new_tokens=12)
        figures = model.forward.figures
        assert len(calls) == 3  # the prompt, the first step, the capture
        assert (figures.captures, figures.replays) == (1, 9)
        assert figures.graphs == len(model.model.layers) + 2  # one is cut where the experts' memory was made
        assert figures.cuts == 9 * len(model.model.layers)
        assert 0 < figures.capture_s < 5
        assert 0 < figures.cpu_s + figures.waited_s < figures.replay_s
        assert phases == [(6, "PREFILL"), *[(1, "DECODE")] * 11]


HOW: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 4},
    "penalty": {"repetition_penalty": 1.3},
    "hidden states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("how", HOW)
def test_ways_to_generate(how: str, device: str, folders: Any) -> None:
    ids, results = _ids(1, 5), []
    for fuse in (True, False):
        with _loaded(folders("qwen3_moe", {}), device, fuse=fuse) as model:
            torch.manual_seed(5)
            options = {"cache_implementation": "static", "max_new_tokens": 14, **GREEDY, **HOW[how]}
            output = model.generate(ids.to(model.device), return_dict_in_generate=True, **options)
            states = torch.cat([step[-1][:, -1].cpu() for step in output.hidden_states or ()] or [torch.zeros(1)])
            results.append((output.sequences.cpu(), states))
            if fuse:
                assert model.forward.figures.replays == 11
    _same(*results, device)


def test_prompts_with_padding(device: str, folders: Any) -> None:
    ids, mask, results = _ids(3, 9), torch.ones(3, 9, dtype=torch.long), []
    for row, pad in enumerate((0, 2, 5)):
        ids[row, :pad], mask[row, :pad] = 2, 0
    for fuse in (True, False):
        with _loaded(folders("mixtral", FULL), device, fuse=fuse) as model:
            results.append(_generate(model, ids, attention_mask=mask))
    _same(*results, device)


def test_assisted_decoding(device: str, folders: Any) -> None:
    """Steps of 1 to 8 tokens, after which the cache goes back. A length that was seen before is replayed."""
    ids, texts = _ids(1, 4).repeat(1, 3), []
    options = {"prompt_lookup_num_tokens": 5, "max_new_tokens": 60, "output_logits": False}
    for fuse in (True, False):
        with _loaded(folders("olmoe", {}), device, fuse=fuse) as model:
            cache, lengths = StepCache(model.config, 80), []
            model.register_forward_pre_hook(
                lambda *given, lengths=lengths: lengths.append(given[-1]["input_ids"].shape[1]), with_kwargs=True
            )
            output = model.generate(ids.to(model.device), past_key_values=cache, **GREEDY, **options)
            texts.append(output.cpu())
            if fuse:
                times = Counter(lengths[1:])  # how long the drafts are depends on the text, so on the random prompt
                again = [times[length] - 1 for length in times if times[length] > 1]
                assert model.forward.figures.captures == len(again)
                assert model.forward.figures.replays == sum(again) - len(again)  # a capture is a step as well
    assert torch.equal(*texts)


def test_steps_of_several_tokens_and_a_cache_that_goes_back(device: str, folders: Any) -> None:
    ids, results = _ids(2, 5), []
    for fuse in (True, False):
        with _loaded(folders("olmoe", {}), device, fuse=fuse) as model, torch.no_grad():
            cache, logits, read = StepCache(model.config, 64), [], 0
            torch.manual_seed(1)
            for step, count in enumerate((5, 1, 3, 3, 1, 3, 1, 3, 3)):
                tokens = ids.to(model.device) if not step else _ids(2, count).to(model.device)
                seen = torch.arange(cache.tokens, device=model.device)
                mask = seen[None, :] <= torch.arange(read, read + count, device=model.device)[:, None]
                positions = torch.arange(read, read + count, device=model.device)[None]
                given = {"attention_mask": mask[None, None].expand(2, 1, -1, -1), "position_ids": positions}
                logits.append(model(tokens, past_key_values=cache, **given).logits.cpu().flatten())
                read += count
                if step in (3, 6):
                    cache.crop(-2)
                    read -= 2
            results.append((torch.tensor(int(cache.get_seq_length())), torch.cat(logits)))
            if fuse:
                assert model.forward.figures.replays == 4  # and a capture of each length
    _same(*results, device)


def test_the_next_cache_of_a_size_takes_over_the_capture(device: str, folders: Any) -> None:
    with _loaded(folders("olmoe", {}), device, fuse=True) as model:
        figures, plain = model.forward.figures, []
        prompts = [_ids(1, 6), _ids(1, 5), _ids(1, 7)]
        ours = [_generate(model, ids, max_new_tokens=20 - ids.shape[1]) for ids in prompts]
        assert figures.captures == 1
        assert figures.replays == 11 + 14 + 12
        _generate(model, _ids(1, 6), max_new_tokens=30)  # a larger one
        assert figures.captures == 2
        kept = StaticCache(model.config, max_cache_len=35)
        ids = _ids(1, 6).to(model.device)
        _generate(model, ids, max_new_tokens=8, past_key_values=kept)
        before = [layer.keys.clone() for layer in kept.layers]
        _generate(model, _ids(1, 6), max_new_tokens=30)  # while the other is still held
        assert figures.captures == 3
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(kept.layers, before, strict=True))
        _generate(model, _ids(2, 6), max_new_tokens=30)  # two sequences
        assert figures.captures == 4
    with _loaded(folders("olmoe", {}), device, fuse=False) as model:
        plain = [_generate(model, ids, max_new_tokens=20 - ids.shape[1]) for ids in prompts]
    for a, b in zip(ours, plain, strict=True):
        _same(a, b, device)


@pytest.mark.parametrize("sizes", [FULL, {"sliding_window": 300}], ids=["full", "window"])
def test_a_conversation(sizes: dict[str, Any], device: str, folders: Any) -> None:
    """Several turns over one cache, which grows."""
    answers = []
    for fuse in (True, False):
        folder = folders("mixtral", {**sizes, "max_position_embeddings": 600})
        with _loaded(folder, device, fuse=fuse, gpu="6MiB") as model:
            tokenizer = load_tokenizer(shape="tiny")
            model.generation_config.eos_token_id = None
            torch.manual_seed(2)
            cache, texts = None, []
            ids = _ids(1, 200)[0]
            for turn in range(3):
                result = generate_text(
                    model, tokenizer, ids, TextOptions(max_new_tokens=40, temperature=0), cache=cache
                )
                assert result.reused_tokens == (0 if not turn else len(ids) - 51)
                cache, ids = result.cache, torch.cat([result.sequence, _ids(1, 50)[0]])
                texts.append(result.sequence)
                assert (result.capture is not None) == fuse
                if result.capture is not None:
                    assert result.capture.replays >= 35
                    # 240 tokens, 330 in a larger cache with a window that becomes full, 420.
                    assert result.capture.captures == (1, 1 if sizes is FULL else 2, 0)[turn]
            answers.append(torch.cat(texts))
    assert torch.equal(*answers)


def test_a_cache_that_grows_is_never_there_twice(device: str, folders: Any) -> None:
    """Layer by layer, and what was captured with it lets it go."""
    with _loaded(folders("olmoe", {}), device, fuse=True) as model, torch.no_grad():
        cache = cache_for(model, None, 200)
        for _ in range(3):
            model(**_next_step(model, cache))
        assert model.forward.figures.captures == 1
        keys = [layer.keys[..., :3, :].clone() for layer in cache.layers]
        old, alive = [ref(layer.keys) for layer in cache.layers], []
        lazy = StaticLayer.lazy_initialization

        def counting(self: Any, *given: Any) -> None:
            alive.append(sum(each() is not None for each in old))
            lazy(self, *given)

        with mock.patch.object(StaticLayer, "lazy_initialization", counting):
            assert cache_for(model, cache, 300) is cache
        assert alive == [len(old) - i for i in range(len(old))]
        assert not any(each() is not None for each in old)
        assert all(torch.equal(layer.keys[..., :3, :], kept) for layer, kept in zip(cache.layers, keys, strict=True))
        model(**_next_step(model, cache))


def test_chat_reuses_and_cuts_its_cache(device: str) -> None:
    texts = []
    for fuse in (True, False):
        with _loaded("demo", device, fuse=fuse, gpu="256MiB") as model:
            tokenizer = load_tokenizer("demo")
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:9] }}\n{% endfor %}"
            )
            chat = ChatSession(model, tokenizer, TextOptions(max_new_tokens=8, temperature=0))
            turns = [chat.ask(text) for text in ("Who was the king?", "And the queen of the land?")]
            assert turns[1].reused_tokens > 0
            assert isinstance(chat._cache, StepCache) == fuse
            texts.append([turn.text for turn in turns])
    assert texts[0] == texts[1]


class _ReadsOnTheHost(nn.Module):
    """A norm that does what no graph can do again."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (1.0 if x.sum().item() > 0 else 0.5)


def test_what_cannot_be_captured_runs_and_says_so_once(
    device: str, folders: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids, results = _ids(1, 5), []
    for fuse in (True, False):
        with _loaded(folders("olmoe", {}), device, fuse=fuse) as model, caplog.at_level(logging.WARNING, "moestro"):
            last = model.model.layers[2]  # the layers before it have been replayed when it is found
            last.input_layernorm = _ReadsOnTheHost(last.input_layernorm)
            results.append([_generate(model, ids)[1], _generate(model, ids, past_key_values=None)[1]])
            if fuse:
                assert (model.forward.figures.captures, model.forward.figures.replays) == (0, 0)
    for ours, theirs in zip(*results, strict=True):
        _same((ids, ours), (ids, theirs), device)
    lines = [capture.getMessage() for capture in caplog.records if "cannot be captured" in capture.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("OlmoeForCausalLM cannot be captured: ")
    assert lines[0].endswith("; it runs eagerly")


def test_recurrent_layers_are_not_captured(device: str, folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    with (
        _loaded(folders("qwen3_next", {}), device, fuse=True) as model,
        caplog.at_level(logging.WARNING, "moestro"),
    ):
        for _ in range(2):
            assert cache_for(model, None, 20) is None
        _generate(model, _ids(1, 5))
        assert model.forward.figures.replays == 0
    assert [r.getMessage() for r in caplog.records].count(
        "Qwen3NextForCausalLM cannot be captured: its cache has a LinearAttentionLayer; it runs eagerly"
    ) == 1


def _interrupted(model: Any, ids: Tensor, at: int) -> None:
    """Generates until the policy has been asked `at` times; then Ctrl-C."""
    policy, calls = model.moestro.policy, []
    decide = policy.decide

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return decide(*args)

    policy.decide = interrupted
    with pytest.raises(KeyboardInterrupt):
        _generate(model, ids)


@pytest.mark.parametrize("at", [3, 14, 40])  # layer steps: in the first step, the capture and a replay
def test_an_interrupt_leaves_a_model_that_works(at: int, device: str, folders: Any) -> None:
    """To the bit where the same experts are in slots: experts that are there already are added first, so that another
    order of the same sum is a rounding error away."""
    ids = _ids(1, 5)
    with _loaded(folders("olmoe", {}), device, fuse=False) as model:
        untouched = _generate(model, ids)
    with _loaded(folders("olmoe", {}), device, fuse=False) as model:
        _interrupted(model, ids, at)
        wanted = [_generate(model, ids) for _ in range(2)]
    with _loaded(folders("olmoe", {}), device, fuse=True) as model:
        _interrupted(model, ids, at)
        captures = model.forward.figures.captures
        for of_same_slots in wanted:
            ours = _generate(model, ids)
            _same(ours, of_same_slots, device)
            _same(ours, untouched, device, exact=False)
        assert model.forward.figures.captures == captures + 1


def test_a_failed_copy_in_a_replay_is_the_cpus_work(folders: Any) -> None:
    ids = _ids(1, 5)
    with _loaded(folders("olmoe", {}), "emulated", fuse=False) as model:
        wanted = _generate(model, ids)
    with _loaded(folders("olmoe", {}), "emulated", fuse=True, gpu=FEW) as model:
        carrier, figures = model.moestro.device.link.carrier, model.forward.figures
        send = carrier.send

        def fail(*given: Any) -> Any:
            if figures.replays < 4:
                return send(*given)
            raise OSError("the link is down")

        carrier.send = fail
        tokens, logits = _generate(model, ids)
        assert torch.equal(tokens, wanted[0])
        torch.testing.assert_close(logits, wanted[1], rtol=1e-3, atol=1e-4)
        assert (figures.captures, figures.replays) == (1, 11)
        carrier.send = send
        assert torch.equal(_generate(model, ids)[0], wanted[0])
        assert figures.replays >= 11 + 11  # an exception that is still held may hold the first cache


def test_a_failed_copy_in_a_capture_is_told_and_the_cache_is_as_before(folders: Any) -> None:
    with _loaded(folders("gpt_oss", {}), "emulated", fuse=True) as model, torch.no_grad():
        cache, policy = StepCache(model.config, 32), model.moestro.policy
        steps, decide = list[int](), policy.decide

        def failing(step: Step, *given: Any) -> Any:
            if len(steps) == 2 and step.layer == 2:
                raise OSError("the link is down")
            return decide(step, *given)

        policy.decide = failing
        given = model.prepare_inputs_for_generation(_ids(1, 9), past_key_values=cache, use_cache=True)
        for _ in range(2):
            model(**given)
            steps.append(1)
            given = _next_step(model, cache)
        lengths = [int(layer.cumulative_length) for layer in cache.layers]
        windows = [layer.keys.clone() for layer in cache.layers if layer.is_sliding]
        with pytest.raises(OSError, match="link is down"):
            model(**given)
        assert lengths == [int(layer.cumulative_length) for layer in cache.layers]
        assert all(
            torch.equal(layer.keys, keys)
            for layer, keys in zip([layer for layer in cache.layers if layer.is_sliding], windows, strict=True)
        )
        policy.decide = decide
        model(**given)
        assert model.forward.figures.captures == 1


def _next_step(model: Any, cache: Any) -> dict[str, Any]:
    at = int(cache.get_seq_length())
    positions = torch.tensor([[at]], device=model.device)
    given: dict[str, Any] = model.prepare_inputs_for_generation(
        _ids(1, 1).to(model.device), past_key_values=cache, position_ids=positions, use_cache=True
    )
    return given


def test_who_listens_to_a_part_is_told(device: str, folders: Any) -> None:
    with _loaded(folders("olmoe", {}), device, fuse=True) as model, torch.no_grad():
        cache, heard = StepCache(model.config, 32), []
        for _ in range(4):
            model(**_next_step(model, cache))
        hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: heard.append(1))
        model(**_next_step(model, cache))
        assert len(heard) == 1
        hook.remove()
        model(**_next_step(model, cache))
        assert len(heard) == 1
        assert model.forward.figures.replays == 2


def test_a_listener_hears_of_each_layer_once(folders: Any) -> None:
    class Heard:
        lookahead = 1

        def __init__(self) -> None:
            self.layers: list[int] = []

        def begin(self, info: Any) -> None: ...

        def asked(self, step: Any, top_k: int) -> None:
            self.layers.append(step.layer)

        def done(self, outcome: Any) -> None: ...

    with _loaded(folders("olmoe", {}), "emulated", fuse=True) as model:
        model.moestro.listener = heard = Heard()
        _generate(model, _ids(1, 5))
        assert heard.layers == [0, 1, 2] * 14
        assert model.forward.figures.replays == 11
        last = model.model.layers[2]  # found when the layers before it have run
        last.input_layernorm = _ReadsOnTheHost(last.input_layernorm)
        model.moestro.listener = heard = Heard()
        _generate(model, _ids(1, 5), max_new_tokens=30)  # in a cache of another size
        assert heard.layers == [0, 1, 2] * 30
        assert model.moestro.counters.layer_steps == 3 * (14 + 30)
        assert model.forward.figures.replays == 11


@pytest.mark.parametrize("policy", ["lru", "moestro", "fiddler"])
def test_inference_mode(policy: str, device: str, folders: Any) -> None:
    """What a step leaves for other threads is no tensor of inference."""
    ids, texts = _ids(1, 6), []
    for mode in (torch.no_grad, torch.inference_mode):
        with _loaded(folders("olmoe", {}), device, fuse=True, policy=policy) as model, mode():
            texts.append(_generate(model, ids)[0])
            assert model.forward.figures.replays
    assert torch.equal(*texts)


@pytest.mark.parametrize("before", ["nobody", "a recorder that wants less", "a timeline"])
def test_a_recorder_gets_the_guesses_that_it_wants(before: str, folders: Any) -> None:
    ids = _ids(1, 5)
    with _loaded(folders("olmoe", {"num_hidden_layers": 5}), "emulated", fuse=True) as model:
        with contextlib.ExitStack() as stack:
            if before == "a timeline":
                stack.enter_context(model.moestro.note_on(Timeline()))
            elif before != "nobody":
                stack.enter_context(listening(model, 1))
            _generate(model, ids)
        with listening(model, 3) as recorder:
            _generate(model, ids)
        trace = recorder.trace(model, "small", None)
        assert all(len(one.steps[0].guesses) == 3 for one in trace.passes)


def test_another_policy_takes_over(device: str, folders: Any) -> None:
    ids = _ids(1, 5)
    with _loaded(folders("olmoe", {}), device, fuse=True) as model:
        wanted = _generate(model, ids)
        before = model.moestro
        conduct_by(model, make_policy("moestro"), 4 * before.spec.slot_bytes, {}, before.costs)
        _same(_generate(model, ids), wanted, device, exact=False)
        assert model.moestro is not before
        assert model.moestro.counters.layer_steps == 14 * 3
        assert model.forward.figures.captures == 2


def test_two_threads_share_a_model(device: str, folders: Any) -> None:
    prompts, results = [_ids(1, 4 + i) for i in range(2)], {}
    with _loaded(folders("olmoe", {}), device, fuse=True) as model:
        wanted = [_generate(model, ids, max_new_tokens=30)[0] for ids in prompts]

        def work(i: int) -> None:
            results[i] = [_generate(model, prompts[i], max_new_tokens=30)[0] for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, text in enumerate(wanted):
        assert all(torch.equal(text, each) for each in results[i])


def test_a_layer_whose_experts_need_no_cut_stays_in_the_graph(device: str, folders: Any) -> None:
    ids, results = _ids(1, 5), []
    for fuse in (True, False):
        with _loaded(folders("olmoe", {}), device, fuse=fuse) as model:
            conductor = model.moestro
            run_layer, held = conductor.run_layer, {1: lambda x, index, weights, *_: x * weights.sum(-1, keepdim=True)}
            if fuse:
                conductor.held_op = lambda layer, dtype, ops=held: ops.get(layer)
            conductor.run_layer = lambda layer, *given, run=run_layer, ops=held: (
                ops[layer](*given) if layer in ops else run(layer, *given)
            )
            results.append(_generate(model, ids))
            if fuse:
                assert model.forward.figures.graphs == len(model.model.layers) + 1
                assert model.forward.figures.replays == 11
    _same(*results, device)


def test_the_tape_itself_costs_the_host_little(folders: Any) -> None:
    """Below 100 us a layer beside the conductor, with graphs that do nothing: what is left is the captured's own."""
    with _loaded(folders("olmoe", {"num_hidden_layers": 8}), "emulated", fuse=True) as model, torch.no_grad():
        cache = StepCache(model.config, 32)
        for _ in range(3):
            model(**_next_step(model, cache))
        (captured,) = model.forward._of_caches[0].steps.values()
        figures = model.forward.figures
        captured.parts = [
            part if isinstance(part, Cut) else SimpleNamespace(replay=lambda: None) for part in captured.parts
        ]
        model.moestro.run_port = lambda *given: None
        given, best_us = _next_step(model, cache), float("inf")
        for _ in range(5):
            before = dataclasses.replace(figures)
            for _ in range(20):
                model(**given)
            best_us = min(best_us, figures.since(before).host_us)
        assert figures.since(before).cuts == 20 * 8
        assert best_us < 100


def test_a_model_gives_its_memory_back(folders: Any) -> None:
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model = load(str(folders("olmoe", {})), device="emulated", threads=1)
        _generate(model, _ids(1, 5))
        store = weakref.ref(model.moestro.store)
        model.moestro.close()
        del model
        assert store() is None
    finally:
        gc.enable()


# Graphs themselves: CUDA's against a stand-in for torch.cuda, and the pretended ones.


class _FakeCuda:
    """Notes what is asked of torch.cuda; a capture can be made to fail at its end."""

    def __init__(self) -> None:
        self.stream, self.log, self.is_broken = "main", [], False
        self.current_stream = lambda: self.stream
        self.pools = ["pool 0"]
        self.graph_pool_handle = lambda: self.pools.append(f"pool {len(self.pools)}") or self.pools[-1]
        self.Stream = lambda device: SimpleNamespace(wait_stream=lambda other: self.log.append(f"wait {other}"))

    def empty_cache(self) -> None:
        assert self.stream == "main"  # not while something is captured

    def set_stream(self, stream: Any) -> None:
        self.stream = stream if stream == "main" else "side"

    def CUDAGraph(self) -> Any:
        def begin(pool: str, capture_error_mode: str) -> None:
            assert (self.stream, pool, capture_error_mode) == ("side", self.pools[-1], "thread_local")
            self.log.append("begin")

        def end() -> None:
            assert self.stream == "side"
            self.log.append("end")
            if self.is_broken:
                raise RuntimeError("operation not permitted when stream is capturing")

        return SimpleNamespace(capture_begin=begin, capture_end=end, replay=lambda: self.log.append("replay"))


def test_cuda_graphs_are_captured_beside_the_stream_and_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda()
    monkeypatch.setattr("moestro.devices.graphs.CUDA", fake)
    ended: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: ended.append(given), raising=False)
    graphs = CudaGraphs(torch.device("cuda", 0))
    graphs.begin()
    assert fake.stream == "side"
    graph = graphs.end()
    assert fake.stream == "main"
    graph.replay()
    once = ["wait main", "begin", "end"]
    assert fake.log == [*once, *once, "replay"]  # first an empty one, which keeps the pool
    graphs.begin()
    fake.is_broken = True
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.end()
    assert fake.stream == "main"
    assert ended == [(0, "pool 1")]
    fake.is_broken = False
    graphs.drop()
    graphs.begin()
    graphs.drop()
    assert fake.stream == "main"
    assert fake.log[7:] == [*once, *once, *once]  # in another pool, which has to be kept as well


def _replayed(x: Tensor, f: Any) -> Any:
    graphs = PretendedGraphs()
    graphs.begin()
    y = f(x)
    graph = graphs.end()
    return graph, y


@torch.no_grad()
def test_a_capture_does_nothing_until_it_is_replayed() -> None:
    x, state = torch.arange(6.0).view(2, 3), torch.zeros(3)

    def step(x: Tensor) -> Tensor:
        y = x.t().reshape(2, 3)
        y += 1
        state.add_(y[0])
        return torch.relu(y)[:, 1:]

    graph, y = _replayed(x, step)
    assert torch.equal(state, torch.zeros(3))
    assert y.isnan().all()
    for count in (1, 2):
        x.copy_(torch.full((2, 3), float(count)))
        graph.replay()
        assert torch.equal(y, torch.full((2, 2), count + 1.0))
    assert torch.equal(state, torch.full((3,), 5.0))


@torch.no_grad()
def test_what_the_host_did_in_between_stays_as_it_was() -> None:
    counter = [0]

    def step(x: Tensor) -> Tensor:
        counter[0] += 1
        return x * counter[0]

    x = torch.ones(2)
    graph, y = _replayed(x, step)
    for _ in range(2):
        graph.replay()
        assert torch.equal(y, torch.ones(2))
    assert counter == [1]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
    ids=["item", "branch", "mask", "nonzero", "host data"],
)
@torch.no_grad()
def test_what_waits_for_the_device_cannot_be_captured(step: Any) -> None:
    graphs, x = PretendedGraphs(), torch.ones(2)
    graphs.begin()
    with pytest.raises(CannotCaptureError):
        step(x)
    graphs.drop()
    graphs.drop()
    assert torch.equal(x * 2, torch.full((2,), 2.0))
