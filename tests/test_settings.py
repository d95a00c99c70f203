"""Each generation setting of a checkpoint does what it does in Transformers, or is refused in one line."""

from __future__ import annotations

import functools
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import moestro
from families import FAMILIES, build_model
from moestro import load, load_tokenizer
from moestro.decode.cpu.masks import MOST_TOKENS
from moestro.engine.steps import PREFILL_TOKENS
from moestro.errors import ModelError, MoestroError, RequestError
from moestro.text.chat import ChatSession
from moestro.text.choices import choose
from moestro.text.generation import generate_text
from moestro.text.options import MOST_GUESSES, TextOptions
from moestro.text.settings import FOLLOWED, OURS, REFUSED, SETTINGS

DEMO = Path(moestro.__file__).parent / "demo"
PROMPT = "the king said to the king and the king said to the"
TOKENS = 8
SAMPLED = {"do_sample": True, "temperature": 1.5}
BEAMS = {"num_beams": 3}

# Key -> values of it, each with the other settings that it needs to do something.
EXAMPLES: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "max_length": [(15, {})],
    "max_new_tokens": [(3, {})],
    "min_length": [(18, {"eos_token_id": [262, 14]})],
    "min_new_tokens": [(6, {"eos_token_id": [262, 14]})],
    "early_stopping": [(True, BEAMS), ("never", BEAMS)],
    "max_time": [(1000.0, {})],
    "stop_strings": [("the", {}), (["great", "and"], {})],
    "do_sample": [(True, {}), (False, {})],
    "num_beams": [(1, {}), (3, {}), (2, SAMPLED)],
    "use_mtp": [(False, {}), (True, {})],
    "use_cache": [(True, {}), (False, {}), (False, BEAMS)],
    "cache_implementation": [(kind, {}) for kind in ("dynamic", "static", "hybrid", "offloaded_static", "paged")]
    + [(kind, BEAMS) for kind in ("dynamic", "static")]
    + [("static", SAMPLED), ("sliding_window", {})],
    "cache_config": [({"nbits": 4}, {}), ({"backend": "hqq", "nbits": 4}, {"cache_implementation": "quantized"})],
    "max_cache_len": [(64, {"cache_implementation": "static"})],
    "temperature": [(0.6, {"do_sample": True})],
    "top_k": [(3, SAMPLED), (0, SAMPLED)],
    "top_p": [(0.5, SAMPLED)],
    "min_p": [(0.2, SAMPLED)],
    "repetition_penalty": [(1.3, {}), (1.3, SAMPLED), (1.3, BEAMS)],
    "top_h": [(0.4, SAMPLED)],
    "typical_p": [(0.5, SAMPLED)],
    "epsilon_cutoff": [(0.01, SAMPLED)],
    "eta_cutoff": [(0.5, SAMPLED)],
    "encoder_repetition_penalty": [(1.5, {})],
    "length_penalty": [(2.0, BEAMS), (-1.0, BEAMS)],
    "no_repeat_ngram_size": [(2, {}), (2, BEAMS)],
    "encoder_no_repeat_ngram_size": [(2, {})],
    "bad_words_ids": [([[672], [278, 262]], {})],
    "renormalize_logits": [(True, {}), (True, SAMPLED)],
    "forced_bos_token_id": [(5, {})],
    "forced_eos_token_id": [(2, {}), ([2, 5], {})],
    "remove_invalid_values": [(True, {})],
    "exponential_decay_length_penalty": [([3, 1.5], {})],
    "suppress_tokens": [([28, 393], {}), ([28, 393], BEAMS)],
    "begin_suppress_tokens": [([672, 14], {})],
    "sequence_bias": [([[[28], -5.0], [[264], 3.0]], {})],
    "token_healing": [(False, {}), (True, {})],
    "guidance_scale": [(1.5, {}), (1.5, SAMPLED), (1.5, {"use_cache": False})],
    "watermarking_config": [({"greenlist_ratio": 0.4, "bias": 4.0}, {})],
    "num_return_sequences": [(1, {}), (2, BEAMS)],
    "output_attentions": [(True, {})],
    "output_hidden_states": [(True, {})],
    "output_scores": [(True, {})],
    "output_logits": [(True, {})],
    "return_dict_in_generate": [(False, {}), (True, {})],
    "pad_token_id": [(7, {}), (7, BEAMS)],
    "bos_token_id": [(7, {})],
    "eos_token_id": [(262, {}), ([262, 14], {}), ([262, 14], BEAMS), (9999, {})],
    "decoder_start_token_id": [(7, {})],
    "is_assistant": [(False, {}), (True, {})],
    "num_assistant_tokens": [(5, {}), (5, {"prompt_lookup_num_tokens": 2})],
    "num_assistant_tokens_schedule": [("heuristic", {})],
    "assistant_confidence_threshold": [(0.2, {})],
    "assistant_lookbehind": [(4, {})],
    "target_lookbehind": [(4, {})],
    "prompt_lookup_num_tokens": [(3, {}), (8, {}), (3, SAMPLED), (2, {"stop_strings": "the"})],
    "max_matching_ngram_size": [(3, {"prompt_lookup_num_tokens": 3})],
    "assistant_early_exit": [(2, {})],
    "assistant_ensemble_weight": [(0.5, {})],
    "speculation_type": [("dflash", {})],
    "compile_config": [(None, {})],
    "disable_compile": [(True, {})],
    "continuous_batching_config": [(None, {})],
    "prefill_chunk_size": [(4, {}), (4, SAMPLED)],
    "low_memory": [(True, {})],
    "penalty_alpha": [(0.0, {}), (0.6, {})],
    "dola_layers": [("low", {})],
    "diversity_penalty": [(0.0, {}), (0.5, {})],
    "num_beam_groups": [(1, {}), (2, BEAMS)],
    "constraints": [([1], {})],
    "force_words_ids": [([[5]], {})],
    "_from_model_config": [(False, {})],
    "transformers_version": [("4.0.0", {})],
}
CASES = [(key, value, others) for key, values in EXAMPLES.items() for value, others in values]
# What decides how steps are made, and not only which token they choose: tried with captured steps too, each time.
STEPS = {
    *("do_sample", "num_beams", "use_cache", "cache_implementation", "max_cache_len", "output_attentions"),
    *("output_hidden_states", "guidance_scale", "prompt_lookup_num_tokens", "prefill_chunk_size", "stop_strings"),
}
ON_DEVICES = [(key, value, others, "cpu") for key, value, others in CASES] + [
    pytest.param(key, value, others, "emulated", marks=[] if key in STEPS else pytest.mark.long)
    for key, value, others in CASES
]


@functools.cache
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


@functools.cache
def ours(device: str) -> Any:
    return load("demo", device=device, dtype="float32", threads=1)


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer("demo")


def settings_of(**changed: Any) -> GenerationConfig:
    """What `from_pretrained` makes of the demo's file with other values in it."""
    file = json.loads((DEMO / "generation_config.json").read_text())
    return GenerationConfig.from_dict(file | changed)


def request(settings: GenerationConfig) -> TextOptions:
    """Nothing of a request but the length: greedy, unless the checkpoint says to sample."""
    return TextOptions(max_new_tokens=TOKENS, temperature=None if settings.do_sample else 0, seed=3)


def test_every_key_of_transformers_has_a_row_and_an_example() -> None:
    keys = {name for name in vars(GenerationConfig()) if name != "_original_object_hash"}
    assert keys == SETTINGS.keys() == EXAMPLES.keys()
    assert {setting.how for setting in SETTINGS.values()} == {FOLLOWED, OURS, REFUSED}
    refused = {key for key, setting in SETTINGS.items() if setting.how == REFUSED}
    assert all(any(not SETTINGS[key].holds(value, 4096) for value, _ in EXAMPLES[key]) for key in refused)


@pytest.mark.parametrize(("key", "value", "others", "device"), ON_DEVICES)
def test_a_setting_is_followed_or_refused(key: str, value: Any, others: dict[str, Any], device: str) -> None:
    settings = settings_of(**{**others, key: value})
    model, ids = ours(device), tokenizer()(PROMPT, return_tensors="pt").input_ids
    model.generation_config = settings
    if value is not None and not SETTINGS[key].holds(value, 4096):
        with pytest.raises(ModelError, match=key) as found:
            generate_text(model, tokenizer(), ids[0], request(settings))
        assert "\n" not in str(found.value)
        return
    reference().generation_config = settings
    arguments = {"max_new_tokens": TOKENS, "return_dict_in_generate": False, "tokenizer": tokenizer()}
    torch.manual_seed(3)
    try:
        right = reference().generate(ids, **(arguments if settings.do_sample else arguments | {"do_sample": False}))
    except Exception:  # such as a cache that needs CUDA: then it is one line of ours
        with pytest.raises(ModelError, match=key):
            generate_text(model, tokenizer(), ids[0], request(settings))
        return
    result = generate_text(model, tokenizer(), ids[0], request(settings))
    assert result.sequence.tolist() == right[0].tolist()


def test_most_settings_change_the_tokens() -> None:
    """Else the test above would not notice that one is not followed."""
    idle = [
        (key, value)
        for key, value, others in CASES
        if key in CHANGING and SETTINGS[key].holds(value, 4096)
        if generated(settings_of(**others | {key: value})) == generated(settings_of(**others))
    ]
    assert not idle


CHANGING = {
    *("top_k", "top_p", "min_p", "repetition_penalty", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
    *("guidance_scale", "watermarking_config", "temperature"),
}


def generated(settings: GenerationConfig) -> list[int]:
    model = ours("cpu")
    model.generation_config = settings
    prompt = tokenizer()(PROMPT, return_tensors="pt").input_ids[0]
    found: list[int] = generate_text(model, tokenizer(), prompt, request(settings)).sequence.tolist()
    return found


@pytest.mark.parametrize("key", SETTINGS)
def test_a_wrong_value_is_at_most_one_line(key: str) -> None:
    model, prompt = ours("cpu"), torch.tensor([5, 6, 7])
    for value in ("x", -1, 2.5, [], {}, [[9999]]):
        model.generation_config = settings_of()
        setattr(model.generation_config, key, value)
        with suppress(MoestroError):
            generate_text(model, tokenizer(), prompt, TextOptions(max_new_tokens=2))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        '{"compile_config": {"mode": "default"}}',
        '{"early_stopping": "x"}',
        '{"cache_implementation": "x"}',
        '{"num_return_sequences": 2}',
        '{"watermarking_config": {"bias": "x"}}',
        '{"watermarking_config": 3}',
        '{"streamer": 3}',
        '{"max_new_tokens": -3}',
        '{"max_new_tokens": "x"}',
        '{"pad_token_id": "x"}',
        '{"token_healing": true}',
        '{"suppress_tokens": 7}',
    ],
)
def test_a_file_that_cannot_be_followed_is_one_line(text: str, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(MoestroError) as found:
        _load_and_ask(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("keeps_file", [True, False])
def test_settings_in_config_json_do_what_they_do_in_transformers(keeps_file: bool, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    if not keeps_file:
        (tmp_path / "generation_config.json").unlink()
    config = tmp_path / "config.json"
    old = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [28],
        "num_beams": 2,
        "use_cache": True,
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | old))
    right = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokenizer()(PROMPT, return_tensors="pt").input_ids
    model = load(str(tmp_path), device="cpu", dtype="float32", threads=1)
    result = generate_text(model, tokenizer(), ids[0], TextOptions(max_new_tokens=TOKENS, temperature=0))
    assert result.sequence.tolist() == right.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0].tolist()


def _load_and_ask(folder: Path) -> None:
    model = load(str(folder), device="cpu", threads=1)
    ChatSession(model, tokenizer(), TextOptions(max_new_tokens=2)).ask("Hello")


def test_a_request_wins_over_the_checkpoint() -> None:
    own = settings_of(
        do_sample=True, temperature=0.3, top_k=7, top_p=0.4, min_p=0.1, repetition_penalty=1.2, num_beams=2
    )
    silent = choose(TextOptions(), own, 4096)
    assert silent.num_beams == 2
    assert {"temperature": 0.3, "top_k": 7, "top_p": 0.4, "min_p": 0.1}.items() <= silent.arguments.items()
    assert "repetition_penalty" not in silent.arguments  # which leaves Transformers the checkpoint's
    said = TextOptions(temperature=0.5, top_k=3, top_p=0.6, min_p=0.0, repetition_penalty=1.0, num_beams=1, stop=["x"])
    spoken = choose(said, own, 4096)
    expected = {"temperature": 0.5, "top_k": 3, "top_p": 0.6, "min_p": None, "repetition_penalty": 1.0, "num_beams": 1}
    assert expected.items() <= spoken.arguments.items()
    assert spoken.stop == ["x"]
    ours_alone = choose(TextOptions(), settings_of(), 4096).arguments
    assert {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 50}.items() <= ours_alone.items()


def test_guesses_from_the_prompt() -> None:
    own = settings_of(prompt_lookup_num_tokens=3)
    for options, wanted in (
        (TextOptions(), 3),
        (TextOptions(prompt_lookup=0), None),
        (TextOptions(prompt_lookup=5), 5),
    ):
        choices = choose(options, own, 4096)
        assert choices.arguments["prompt_lookup_num_tokens"] == wanted
        assert choices.goes_back == (wanted is not None)
        assert choices.can_continue  # tests/test_draft.py has what it continues with
    assert choose(TextOptions(), settings_of(), 4096).arguments["prompt_lookup_num_tokens"] is None
    with pytest.raises(RequestError, match="guesses for one text, not for 3 beams; leave one out"):
        choose(TextOptions(prompt_lookup=2, num_beams=3), settings_of(), 4096)
    assert MOST_GUESSES + 1 == PREFILL_TOKENS <= MOST_TOKENS


CHATS: list[dict[str, Any]] = [
    *({}, {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}),
    *({"prompt_lookup_num_tokens": 3}, BEAMS, {"guidance_scale": 1.5}, {"prefill_chunk_size": 4}),
]


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("changed", "device"),
    [(changed, "cpu") for changed in CHATS]
    + [
        pytest.param(changed, "emulated", marks=[pytest.mark.long] if at > 4 else [])
        for at, changed in enumerate(CHATS)
    ],
    ids=str,
)
def test_a_chat_answers_as_one_that_reads_everything_again(changed: dict[str, Any], device: str) -> None:
    model = ours(device)
    model.generation_config = settings_of(**changed)
    keeps = changed.get("cache_implementation") != "static"
    keeps &= not changed.keys() & {"use_cache", "num_beams"}
    chat = ChatSession(model, tokenizer(), TextOptions(max_new_tokens=6, temperature=0))
    for turn, text in enumerate(("the king said to the king and the king", "And then the king", "Why?")):
        fresh = ChatSession(model, tokenizer(), TextOptions(max_new_tokens=6, temperature=0))
        fresh.messages = list(chat.messages)
        right, got = fresh.ask(text), chat.ask(text)
        assert got.sequence.tolist() == right.sequence.tolist()
        assert got.reused_tokens < got.prompt_tokens
        assert (got.reused_tokens > 0) == (turn > 0 and keeps)


@pytest.mark.parametrize("changed", [{"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_next"])
def test_sliding_windows_and_recurrent_states_follow_settings(
    name: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    """Their caches cannot go back, or only some can: as in Transformers, or the line where that raises."""
    right = build_model(next(family for family in FAMILIES if family.name == name))
    right.save_pretrained(tmp_path)
    model = load(str(tmp_path), device="emulated", dtype="float32", threads=1)
    for each in (right, model):
        each.generation_config = GenerationConfig(**changed)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 9, 5, 6]])
    options = TextOptions(max_new_tokens=TOKENS, temperature=0)
    try:
        expected = right.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0]
    except ValueError:  # assisted decoding with a recurrent state
        with pytest.raises(ModelError, match="prompt_lookup_num_tokens 3"):
            generate_text(model, tokenizer(), ids[0], options)
        return
    assert generate_text(model, tokenizer(), ids[0], options).sequence.tolist() == expected.tolist()
