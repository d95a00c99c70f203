"""Whatever a chat template does, a conversation is what Transformers renders, or one line says why it is not."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import moestro
from chat_templates import TEMPLATES
from moestro import load, load_tokenizer
from moestro.cli import main as cli
from moestro.errors import MoestroError, RequestError
from moestro.text.chat import ChatSession
from moestro.text.generation import generate_text
from moestro.text.options import TextOptions
from moestro.text.templates import answer_message, check_template, render
from moestro.text.tracing import trace_text

DEMO = Path(moestro.__file__).parent / "demo"
USER, LATER = "Who was the king?", "And\nthe queen?"
TURNS = [
    [{"role": "user", "content": USER}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": USER}],
    [
        {"role": "user", "content": USER},
        {"role": "assistant", "content": "Long dead."},
        {"role": "user", "content": LATER},
    ],
]


@functools.cache
def demo_tokenizer() -> Any:
    return load_tokenizer("demo")


def of_transformers(messages: Sequence[dict[str, Any]]) -> list[str]:
    """What Transformers makes of messages as texts and in parts, where it makes anything."""
    found = []
    for shaped in (messages, [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]):
        try:
            found.append(demo_tokenizer().apply_chat_template(shaped, add_generation_prompt=True, tokenize=False))
        except Exception:  # a template may raise anything
            continue
    return [text for text in found if not re.search(r"""['"]type['"]:\s*['"]text""", text)]  # parts written as a list


def compare(template: Any) -> bool:
    """Whether anything could be rendered, as Transformers does; else there was one line each time."""
    demo_tokenizer().chat_template = template
    rendered = False
    for messages in TURNS:
        said = messages[-1]["content"]
        try:
            text = render(demo_tokenizer(), messages)
        except MoestroError as error:
            line = str(error)
        else:
            rendered, line = True, ""
            assert text in of_transformers(messages)
            # A damaged template may write a message otherwise (its repr, in capitals), but not leave it out.
            assert said in text or text not in of_transformers([*messages[:-1], {**messages[-1], "content": "Else?"}])
        assert "\n" not in line
        assert not line or not any(said in text for text in of_transformers(messages))
    return rendered


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name: str) -> None:
    assert compare(TEMPLATES[name]) == (name != "no-user")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_damaged_template_renders_as_in_transformers_or_is_one_line(
    name: str, request: pytest.FixtureRequest
) -> None:
    random = Random(f"{request.config.getoption('--seed')} {name}")
    words = re.findall(r"\w+|\s+|[^\w\s]", TEMPLATES[name])
    others = re.findall(r"\w+|[^\w\s]", "".join(TEMPLATES.values()))
    for _ in range(25):
        damaged = list(words)
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(damaged))
            damaged[at : at + 1] = random.choice([[], [damaged[at]] * 2, [random.choice(others)]])
        compare("".join(damaged))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[9].content.x }}",
        "{{ messages | map('x') | list }}",
        "{% include 'x' %}",
        "{{ raise_exception(3) }}",
        "{{ raise_exception('two\nlines') }}",
        "{{ ''.__class__.__mro__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages %}{{ m.content | nothing }}{% endfor %}",
        {"tool_use": "x", "rag": "y"},
        {"tool_use": "x", "default": "{{ 1 / 0 }}"},
        {"default": 3},
        3,
        "no message at all",
        "{{ '' }}",
    ],
    ids=str,
)
def test_what_a_template_raises_is_one_line(template: Any) -> None:
    assert not compare(template)
    for system in (None, "Be brief."):
        with pytest.raises(RequestError, match="chat template") as found:
            check_template(demo_tokenizer(), system)
        assert "\n" not in str(found.value)


def test_a_system_prompt_that_would_be_lost_is_refused() -> None:
    demo_tokenizer().chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    check_template(demo_tokenizer(), None)
    with pytest.raises(RequestError, match="leaves out the system prompt"):
        check_template(demo_tokenizer(), "Be brief.")


def test_reasoning_goes_to_templates_that_read_it() -> None:
    tokenizer = demo_tokenizer()
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        message = answer_message(tokenizer, "Yes.", "Hm.")
        assert (len(message) > 2) == (name in {"qwen3", "gpt-oss", "magistral"})
        history = [{"role": "user", "content": "Is it?"}, message, {"role": "user", "content": "Why?"}]
        if name != "no-user":  # templates drop what was thought in earlier turns, or keep it
            assert ("Hm." in render(tokenizer, history)) == (name == "magistral")


@pytest.fixture
def copy_with(tmp_path: Path) -> Any:
    def build(template: Any, tokens: Sequence[str] = ()) -> str:
        shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
        if tokens:
            tokenizer = AutoTokenizer.from_pretrained(tmp_path)
            tokenizer.add_tokens(list(tokens), special_tokens=True)
            tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        return str(tmp_path)

    return build


def run_chat(monkeypatch: pytest.MonkeyPatch, folder: str, *options: str, said: Sequence[str] = ("Hello",)) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in said)))
    arguments = ["moestro", "chat", folder, "-n", "3", "--device", "cpu", "--threads", "1", *options]
    monkeypatch.setattr("sys.argv", arguments)
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", ["mixtral", "no-user"])
def test_chat_refuses_before_it_loads(
    name: str, copy_with: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_with(TEMPLATES[name])
    (Path(folder) / "model.safetensors").unlink()
    assert run_chat(monkeypatch, folder, "--system", "Be brief.") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: the tokenizer's chat template")


def test_a_message_that_the_template_refuses_ends_a_chat_that_is_piped(
    copy_with: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_with(TEMPLATES["gpt-oss"])
    assert run_chat(monkeypatch, folder, said=["Hello", "What is <|channel|>?"]) == 2
    assert "put thoughts into thinking" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("bits", ["16", "8"])
def test_tokens_that_the_model_has_no_rows_for_are_refused(
    bits: str, copy_with: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_with("{% for m in messages %}<|extra|>{{ m.content }}{% endfor %}", ["<think>", "<|extra|>"])
    assert run_chat(monkeypatch, folder, "--bits", bits) == 2
    assert "'<|extra|>' of id 4097, but the model has 4096 tokens" in capsys.readouterr().err.strip().splitlines()[-1]
    model, tokenizer = load(folder, device="cpu", threads=1, bits=int(bits)), load_tokenizer(folder)
    for prompt in ("Once <think>", torch.tensor([5, -1]), torch.tensor([4096]), torch.tensor([2**40])):
        with pytest.raises(RequestError, match="the model has 4096 tokens"):
            generate_text(model, tokenizer, prompt, TextOptions(max_new_tokens=1))
    for wrong in (torch.tensor([[5]]), torch.tensor([0.5]), torch.tensor(5), torch.tensor([], dtype=torch.long)):
        with pytest.raises(RequestError, match="needs ids of one or more tokens"):
            generate_text(model, tokenizer, wrong, TextOptions(max_new_tokens=1))
    with pytest.raises(RequestError, match="the model has 4096 tokens"):
        trace_text(model, tokenizer, "demo", "Once <think>" * 9, tokens=2, prompt_tokens=2, decode_tokens=2)
    stopped = generate_text(model, tokenizer, "Once", TextOptions(max_new_tokens=2, temperature=0, stop=["<think>"]))
    assert stopped.new_tokens == 2


class _Broken:
    """A tokenizer whose code fails."""

    def __init__(self, tokenizer: Any, method: str) -> None:
        self._tokenizer, self._method = tokenizer, method

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            raise KeyError("two\nlines")
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._method == "__call__":
            raise KeyError("two\nlines")
        return self._tokenizer(*args, **kwargs)


@pytest.mark.parametrize("method", ["__call__", "decode", "apply_chat_template"])
def test_what_a_tokenizer_raises_is_one_line(method: str) -> None:
    model = load("demo", device="cpu", threads=1)
    tokenizer: Any = load_tokenizer("demo")
    tokenizer.chat_template = TEMPLATES["chatml"]
    with pytest.raises(MoestroError, match="KeyError") as found:
        ChatSession(model, _Broken(tokenizer, method), TextOptions(max_new_tokens=2)).ask("Hello")  # type: ignore[arg-type]
    assert "\n" not in str(found.value)
