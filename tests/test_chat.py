"""Conversations: what a turn costs, and that a reused KV cache changes nothing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from moestro import load, load_tokenizer
from moestro.errors import RequestError
from moestro.text.chat import ChatSession
from moestro.text.generation import generate_text
from moestro.text.options import TextOptions

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OPTIONS = TextOptions(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return load("demo", dtype="float32", threads=1, device="cpu")


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_turn_costs_its_own_tokens(model: Any, tokenizer: Any) -> None:
    chat = ChatSession(model, tokenizer, OPTIONS, system="You tell fairy tales.")
    first = chat.ask("Who was the king?")
    assert first.reused_tokens == 0
    tokens_before = model.moestro.counters.tokens
    second = chat.ask("And the queen?")
    assert second.reused_tokens >= first.prompt_tokens
    computed = (model.moestro.counters.tokens - tokens_before) // 6 // 2  # layers, top-2
    assert computed == second.prompt_tokens - second.reused_tokens + second.new_tokens - 1
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_reused_cache_changes_no_answer(model: Any, tokenizer: Any) -> None:
    chat = ChatSession(model, tokenizer, OPTIONS)
    for text in ("Who was the king?", "And the queen?", "Where did they live?"):
        result = chat.ask(text)
        alone = ChatSession(model, tokenizer, OPTIONS)
        alone.messages = chat.messages[:-2]
        assert alone.ask(text).text == result.text


def test_a_template_that_rewrites_history_is_followed(model: Any, tokenizer: Any) -> None:
    """Only the part of the cache that still holds is kept."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:4] }}\n{% endfor %}assistant: "
    )
    chat = ChatSession(model, tokenizer, OPTIONS)
    chat.ask("Who was the king?")
    second = chat.ask("And the queen?")
    assert second.reused_tokens < 6
    alone = ChatSession(model, tokenizer, OPTIONS)
    alone.messages = chat.messages[:-2]
    assert alone.ask("And the queen?").text == second.text


def test_without_a_template_the_model_continues_the_text(model: Any) -> None:
    chat = ChatSession(model, load_tokenizer("demo"), OPTIONS)
    assert not chat.has_template
    chat.ask("Once upon a time")
    second = chat.ask("The wolf said")
    assert second.reused_tokens > 4


def test_a_stopped_answer_is_kept_and_the_talk_goes_on(model: Any, tokenizer: Any) -> None:
    chat = ChatSession(model, tokenizer, TextOptions(max_new_tokens=100, temperature=0))
    pieces: list[str] = []
    result = chat.ask("Who was the king?", on_text=pieces.append, should_stop=lambda: len(pieces) >= 3)
    assert 3 <= result.new_tokens < 20
    assert result.text == "".join(pieces) == chat.messages[-1]["content"]
    assert chat.ask("And the queen?").reused_tokens > 0


def test_a_full_context_is_refused_and_the_conversation_stays(model: Any, tokenizer: Any) -> None:
    chat = ChatSession(model, tokenizer, OPTIONS)
    chat.ask("Who was the king?")
    before = list(chat.messages)
    with pytest.raises(RequestError, match="the model's context is 512"):
        chat.ask("word " * 600)
    assert chat.messages == before
    assert chat.ask("And the queen?").new_tokens == 12
    chat.reset()
    assert chat.messages == []


def test_what_the_model_is_told_first_can_be_changed(model: Any, tokenizer: Any) -> None:
    chat = ChatSession(model, tokenizer, OPTIONS, system="You tell fairy tales.")
    chat.ask("Who was the king?")
    chat.tell_first("Be brief.")
    assert [m["content"] for m in chat.messages][:2] == ["Be brief.", "Who was the king?"]
    second = chat.ask("And the queen?")
    alone = ChatSession(model, tokenizer, OPTIONS)
    alone.messages = chat.messages[:-2]
    assert alone.ask("And the queen?").text == second.text
    chat.reset()
    assert chat.messages == [{"role": "system", "content": chat.system}] == [{"role": "system", "content": "Be brief."}]
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="leaves out the system prompt"):
        chat.tell_first("Be long.")
    assert chat.system == "Be brief."


def test_recurrent_models_read_the_history_again() -> None:
    """A recurrent state cannot go back, so the cache is made anew where the history changed."""
    from families import FAMILIES, build_model
    from moestro.text.generation import generate_text  # noqa: F401

    family = next(f for f in FAMILIES if f.name == "lfm2_moe")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        build_model(family).save_pretrained(folder)
        model = load(folder, threads=1, device="cpu")
    from transformers import DynamicCache

    chat = ChatSession(model, load_tokenizer(shape="tiny"), OPTIONS)
    ids = torch.arange(5, 25)
    chat._cache, chat._cached_ids = DynamicCache(config=model.config), None
    with torch.no_grad():
        out = model(ids[None], past_key_values=chat._cache, use_cache=True)
    chat._cache, chat._cached_ids = out.past_key_values, ids
    changed = torch.cat([ids[:10], torch.tensor([99, 98, 97])])
    cache = chat._usable_cache(changed)
    with torch.no_grad():
        start = 0 if cache is None else cache.get_seq_length()
        a = model(changed[None, start:], past_key_values=cache, use_cache=True).logits[0, -1]
        b = model(changed[None]).logits[0, -1]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Scripted:
    """A small gpt-oss model that follows each token by the next one of a script, and its tokenizer."""

    def __init__(self, folder: Path, marks: list[str], script: list[str], template: str) -> None:
        words = [*marks, *dict.fromkeys(word for word in script if word not in marks), "user", "hi", " "]
        backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=" "))
        backend.add_special_tokens(marks)
        backend.pre_tokenizer, backend.decoder = Split(Regex(r"[\s\S]"), "isolated"), Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=script[-1])
        self.tokenizer.chat_template = template
        config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        end = words.index(script[-1])
        ends = {"eos_token_id": end, "pad_token_id": end, "layer_types": ["full_attention"]}
        model = GptOssForCausalLM(GptOssConfig(**config, **heads, **ends, vocab_size=len(words)))
        with torch.no_grad():  # the layer adds nothing, and the head looks for what comes next
            layer = model.model.layers[0]
            for part in (layer.self_attn.o_proj, layer.mlp.experts):
                for name, weight in part.named_parameters():
                    if name in ("weight", "bias", "down_proj", "down_proj_bias"):
                        weight.zero_()
            table = model.model.embed_tokens.weight.copy_(torch.randn(len(words), 64))
            model.lm_head.weight.zero_()
            for before, after in pairwise(script):
                model.lm_head.weight[words.index(after)] += table[words.index(before)]
        model.save_pretrained(folder)
        self.model = load(str(folder), device="cpu", threads=1)


HARMONY = "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
THINK = (
    "{% for m in messages %}{{ m.content }}{% if m.reasoning_content %}"
    "({{ m.reasoning_content }}){% endif %}<go>{% endfor %}"
)


@pytest.mark.parametrize(
    ("marks", "script", "template", "is_kept", "thinks_for"),
    [
        (
            ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
            ["<|end|>", "<|channel|>", "analysis", "<|message|>", "Hm.", "<|start|>", "assistant", "final", "Yes!"],
            HARMONY,
            False,
            4,
        ),
        (["<think>", "</think>", "<go>"], ["<go>", "<think>", "Hm.", "</think>", "Yes!"], THINK, True, 2),
    ],
)
def test_what_is_thought_aloud_is_told_apart(
    marks: list[str], script: list[str], template: str, is_kept: bool, thinks_for: int, tmp_path: Path
) -> None:
    end = "<|return|>" if "<|return|>" in marks else "<stop>"
    toy = Scripted(tmp_path, list(dict.fromkeys([*marks, end])), [*script, end], template)
    chat = ChatSession(toy.model, toy.tokenizer, TextOptions(max_new_tokens=20, temperature=0))
    for _ in range(2):
        said: list[str] = []
        thought: list[str] = []
        result = chat.ask("hi", on_text=said.append, on_reasoning=thought.append)
        assert "".join(said) == result.text == result.to_json()["text"] == "Yes!"
        assert "".join(thought) == result.reasoning == result.to_json()["reasoning"] == "Hm."
        assert ("Hm." in str(chat.messages)) == is_kept  # where the template reads it, and may drop it
    short = ChatSession(toy.model, toy.tokenizer, TextOptions(max_new_tokens=thinks_for, temperature=0))
    result = short.ask("hi")
    assert (result.text, result.reasoning) == ("", "Hm.")
    ids = toy.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt").input_ids[0]
    whole = generate_text(toy.model, toy.tokenizer, ids, TextOptions(temperature=0), splits_channels=False)
    assert (whole.text, whole.reasoning) == ("".join(word for word in script if word not in marks), None)
