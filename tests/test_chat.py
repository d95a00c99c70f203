"""Conversations: what a turn costs, and that a reused KV cache changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro import load, load_tokenizer
from moestro.chat import ChatSession
from moestro.errors import RequestError
from moestro.generation import TextOptions

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


def test_recurrent_models_read_the_history_again() -> None:
    """A recurrent state cannot go back, so the cache is made anew where the history changed."""
    from families import FAMILIES, build_model
    from moestro.generation import generate_text  # noqa: F401

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
