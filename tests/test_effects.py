"""Nothing is silent: an option without effect is said or refused, missing kernels and page faults are told."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import moestro
from moestro import load
from moestro.cli import main as cli
from moestro.errors import MoestroError
from moestro.planning.effects import Setting, without_effect
from moestro.planning.options import ModelOptions, Options
from moestro.planning.spelling import as_flags, flag
from moestro.text import choices, generation
from moestro.text.faults import PageFaults
from moestro.text.options import TextOptions

DEMO = Path(moestro.__file__).parent / "demo"
CPU, GPU = Setting("plain", has_gpu=False), Setting("plain", has_gpu=True)
SHAPE, STORED = Setting("shape", has_gpu=False), Setting("stored", has_gpu=False)
PACKED, HUB = Setting("packed", has_gpu=True), Setting("plain", has_gpu=True, is_here=False)
ALL = (CPU, GPU, SHAPE, STORED, PACKED, HUB)
ALWAYS: tuple[Setting, ...] = ()

# Of every option: a value that is not the default, and in which settings it changes nothing. Where an option has an
# effect, or is refused (a GPU's memory or its link without a GPU, bits of weights that are quantized, --transcode of
# what is no GGUF file), other tests hold it.
EFFECTS: dict[str, tuple[Any, tuple[Setting, ...]]] = {
    "gpu_memory": ("1GiB", ALWAYS),
    "ram": ("1GiB", ALWAYS),
    "context": (64, (CPU, SHAPE, STORED)),
    "sequences": (2, ALWAYS),
    "policy": ("lru", (CPU, SHAPE, STORED)),
    "device": ("cpu", ALWAYS),
    "link": ("12GB/s", ALWAYS),
    "machine": ("rtx4090", (CPU, SHAPE, STORED)),
    "clock": ("virtual", ALWAYS),
    "profile": ("x.trace", (CPU, SHAPE, STORED)),
    "threads": (1, ALWAYS),
    "bits": (4, ALWAYS),
    "expert_bits": (4, ALWAYS),
    "dense_bits": (4, ALWAYS),
    "head_bits": (4, ALWAYS),
    "fit": ("none", ALL),  # as long as no bits are named
    "transcode": (8, ALWAYS),
    "cache": (False, ALL),  # likewise
    "fuse": (False, ALWAYS),
    "pack_dense": (False, (GPU, PACKED, HUB)),
    "shape": ("tiny", ALWAYS),
    "revision": ("v2", (CPU, GPU, SHAPE, STORED, PACKED)),
    "config": ("demo", (SHAPE,)),
    "tokenizer": ("demo", (SHAPE,)),
    "trust_remote_code": (True, (SHAPE,)),
    "dtype": ("float32", ALWAYS),
    **dict.fromkeys(("token", "cache_dir"), ("hf_x", (CPU, GPU, SHAPE, STORED, PACKED))),
    "local_files_only": (True, (CPU, GPU, SHAPE, STORED, PACKED)),
    "attn_implementation": ("eager", ALWAYS),
    "seed": (3, (CPU, GPU, STORED, PACKED, HUB)),  # of `moestro.load`; a text is drawn by it
}


@pytest.mark.parametrize("name", [one.name for kind in (Options, ModelOptions) for one in fields(kind)])
def test_each_option_is_said_where_it_changes_nothing(name: str) -> None:
    value, idle = EFFECTS[name]
    more = {"device": "emulated", "machine": "rtx4090"} if name == "clock" else {}
    of_model = name in {one.name for one in fields(ModelOptions)}
    options = Options() if of_model else Options(**{name: value} | more)
    source = ModelOptions(**{name: value}) if of_model else ModelOptions()
    shown = flag(f"no_{name}" if value is False else name)
    shown += "" if isinstance(value, bool) or name == "token" else f" {value}"
    for setting in ALL:
        with as_flags():
            lines = [line for line in without_effect(options, source, setting) if "--machine" not in line or not more]
        assert len(lines) == (setting in idle), (setting, lines)
        assert all(line.startswith(f"{shown} changes nothing here: ") and "\n" not in line for line in lines)
        of_load = "token" if name == "token" else f"{name}={value!r}"  # a token is never shown
        lines = [line for line in without_effect(options, source, setting) if "machine=" not in line or not more]
        assert all(line.startswith(f"{of_load} changes nothing here: ") for line in lines)
        assert not without_effect(Options(), ModelOptions(), setting)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"fit": "none", "bits": 4}, CPU),
        ({"fit": "none", "dense_bits": 2}, CPU),
        ({"cache": False, "bits": 8}, CPU),
        ({"policy": "cpu-only"}, CPU),
    ],
    ids=str,
)
def test_beside_others_an_option_has_its_effect(options: dict[str, Any], setting: Setting) -> None:
    lines = without_effect(Options(**options), ModelOptions(), setting)
    assert not lines


def _packed(folder: Path) -> str:
    from moestro.loading.pack import pack

    pack("demo", folder / "packed", ModelOptions(), Options())
    return str(folder / "packed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("where", ["demo", "shape", "packed", "emulated"])
def test_load_says_each_once(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the table says, of models that are loaded."""
    own = {"shape": "tiny"} if where == "shape" else {}
    model = {"shape": None, "packed": None}.get(where, "demo")
    if where == "packed":
        model = _packed(tmp_path)
    given = {"policy": "lru", "context": 64, "machine": "rtx4090", "fit": "none", "cache": False, "revision": "v2"}
    device = "emulated" if where == "emulated" else "cpu"
    load(model, **given, **own, device=device, threads=1).moestro.close()
    said = [found[1] for line in caplog.messages if (found := re.match(r"(\w+)=.* changes nothing here: ", line))]
    expected = ["fit", "cache", "revision"]
    assert sorted(said) == sorted(expected if where == "emulated" else [*expected, "policy", "context", "machine"])


IDLE_TEXT: dict[str, tuple[Any, bool]] = {  # a value, and whether it changes nothing where nothing is drawn
    "max_new_tokens": (3, False),
    "temperature": (0.0, False),
    "top_p": (0.5, True),
    "top_k": (3, True),
    "min_p": (0.1, True),
    "repetition_penalty": (1.5, False),
    "seed": (3, True),
    "stop": (("x",), False),
    "num_beams": (3, False),
    "prompt_lookup": (3, False),
    "draft": ("demo", False),
}


@pytest.mark.parametrize("name", [one.name for one in fields(TextOptions)])
def test_options_of_drawing_are_said_where_nothing_is_drawn(name: str) -> None:
    value, idle = IDLE_TEXT[name]
    given = {name: value}
    greedy = given if name == "temperature" else given | {"temperature": 0}
    lines = choices.without_effect(TextOptions(**greedy), GenerationConfig())
    assert len(lines) == idle
    assert all(line.startswith(f"{name}={value!r} changes nothing here: ") for line in lines)
    if name not in ("temperature", "num_beams"):
        assert not choices.without_effect(TextOptions(**given), GenerationConfig())
        own = GenerationConfig(do_sample=False)  # a checkpoint may say so too
        assert len(choices.without_effect(TextOptions(**given), own)) == idle


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moestro", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return call


SHORT = ("-n", "3", "--temperature", "0", "--threads", "1", "--device", "cpu")


def test_missing_kernels_are_said_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "kernels" not in run("run", "--shape", "tiny", "Hello", *SHORT)[2]
    monkeypatch.setattr("moestro.cli.notes.levels", dict)
    err = run("run", "--shape", "tiny", "Hello", *SHORT)[2]
    assert err.count("without its CPU kernels") == 1
    assert "install a C++ compiler (g++ or clang), then Moestro again" in err


def test_page_faults_are_shown_and_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def major_faults() -> int:
        nonlocal count
        count += 100_000
        return count

    arguments = ("run", "--shape", "tiny", "Hello", *SHORT)
    monkeypatch.setattr(generation, "major_faults", lambda: 7)
    assert "disk" not in run(*arguments)[2]
    monkeypatch.setattr(generation, "major_faults", major_faults)
    err = run(*arguments)[2]
    assert "disk     100000 pages of memory fetched from disk while reading the prompt, 200000 while" in err
    assert err.count("warning: the answer waited for the disk: 100000 pages for each token, at least 100% of") == 1
    assert json.loads(run(*arguments, "--json")[1])["major_page_faults"] == {"prefill": 100_000, "decode": 200_000}


def test_faults_that_cost_little_are_no_warning() -> None:
    assert PageFaults(prefill=10**6, decode=900, steps=11, decode_s=1.0).warning() is None
    assert PageFaults(prefill=0, decode=1100, steps=11, decode_s=1.0).warning() is not None
    assert PageFaults(prefill=5, decode=0, steps=1, decode_s=0.0).warning() is None


@pytest.fixture
def with_template(tmp_path: Path) -> str:
    """The demo with a chat template, and with a token that the model has no row for."""
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return str(tmp_path)


def test_run_takes_a_chat_template_and_says_so(run: Run, with_template: str) -> None:
    long = (*SHORT[2:], "-n", "12", "--dtype", "float32")
    asked, prompt = "Who was the king?", "user: Who was the king?\nassistant:"
    status, answer, err = run("run", with_template, asked, *long)
    assert not status
    assert err.count("--raw continues it as it is") == 1
    found = json.loads(run("run", with_template, asked, *long, "--json")[1])
    plain = json.loads(run("run", "demo", prompt, *long, "--json")[1])
    assert found["chat_template"]
    assert not plain["chat_template"]
    assert found["text"] == plain["text"]
    assert found["prompt_tokens"] == plain["prompt_tokens"]
    assert answer == f"{found['text']}\n"  # the prompt is not printed again

    _, text, err = run("run", with_template, asked, *long, "--raw")
    assert text == run("run", "demo", asked, *long)[1]
    assert text.startswith(asked)
    assert "template" not in err


@pytest.mark.parametrize("prompt", ["word " * 600, ""])
@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_nothing_is_printed_of_a_prompt_that_is_refused(
    prompt: str, raw: tuple[str, ...], run: Run, with_template: str
) -> None:
    if raw and not prompt:
        return  # a text may begin with nothing
    status, out, err = run("run", with_template, prompt, *SHORT, *raw)
    assert (status, out) == (2, "")
    assert "shorten it" in err if prompt else "a chat template needs a message; --raw" in err


def test_nothing_is_printed_before_guesses_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of the checks, by which all others are done."""

    def refuse(*_: Any) -> None:
        raise MoestroError("no guesses")

    monkeypatch.setattr(generation, "_cache_to_fill", refuse)
    assert run("run", "demo", "Once", *SHORT)[:2] == (2, "")


def test_a_template_that_fails_offers_raw(run: Run, with_template: str) -> None:
    path = Path(with_template) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ 1 / 0 }}"}))
    status, out, err = run("run", with_template, "Once", *SHORT)
    assert (status, out) == (2, "")
    assert err.strip().endswith("or --raw, which leaves the template out")
    assert not run("run", with_template, "Once", *SHORT, "--raw")[0]
