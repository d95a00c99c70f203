"""Tokens that a draft guesses change no answer; what cannot be had with a draft is refused before a model loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import toy_tokenizers
from families import save_model
from moestro import load, load_tokenizer
from moestro.cli.main import main
from moestro.errors import MoestroError, RequestError
from moestro.planning.options import ModelOptions, Options
from moestro.text.assisted import DRAFTED, draft_bytes, load_draft
from moestro.text.choices import choose
from moestro.text.generation import generate_text
from moestro.text.options import TextOptions

ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 2, "dtype": "float32"}
SOURCE, ENGINE = ModelOptions(dtype="float32"), Options(threads=2)
GREEDY: dict[str, Any] = {"temperature": 0}


def drafts_of(folder: Path, other: Path) -> list[Any]:
    """The model itself, which is always right, and one of another family that is never sure of anything."""
    save_model("olmoe", other, {"num_hidden_layers": 1})
    found = [load_draft(str(each), SOURCE, ENGINE)[0] for each in (folder, other)]
    for each in found:
        each.generation_config.assistant_confidence_threshold = 0  # else random weights guess one token at a time
    return found


@pytest.mark.sample(3)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_draft_changes_no_answer(family: str, device: str, tmp_path: Path) -> None:
    """Of a first turn and of a second one, which goes on with the cache where that can go back."""
    save_model(family, tmp_path / "model")
    memory = {} if device == "cpu" else {"gpu_memory": "560KiB", "policy": "lru"}
    model = load(str(tmp_path / "model"), **ON_CPU | {"device": device}, **memory)
    tokenizer, ids = load_tokenizer(shape="tiny"), torch.randint(3, 100, (9,))
    wanted = generate_text(model, tokenizer, ids, TextOptions(max_new_tokens=20, **GREEDY))
    more = torch.cat((wanted.sequence, torch.randint(3, 100, (3,))))
    second = generate_text(model, tokenizer, more, TextOptions(max_new_tokens=12, **GREEDY)).sequence
    itself, other = drafts_of(tmp_path / "model", tmp_path / "other")
    for draft, guess in ((itself, {"draft": "a"}), (other, {"draft": "b"}), (None, {"prompt_lookup": 3})):
        options = TextOptions(max_new_tokens=20, **GREEDY, **guess)  # type: ignore[arg-type]
        text = generate_text(model, tokenizer, ids, options, draft=draft)
        assert torch.equal(text.sequence, wanted.sequence)
        figures = text.assisted
        assert figures is not None
        assert figures.accepted_tokens == text.new_tokens - figures.steps
        if draft is itself:
            assert (figures.steps, figures.accepted_tokens, figures.drafted_tokens) == (4, 16, 16)
        elif draft is other:
            assert figures.drafted_tokens is not None
            assert figures.accepted_tokens < figures.drafted_tokens
            assert figures.drafted_tokens > DRAFTED * (figures.steps - DRAFTED)
        assert (text.cache is None) == (family == "mixtral")  # whose windows cannot go back
        again = TextOptions(max_new_tokens=12, **GREEDY, **guess)  # type: ignore[arg-type]
        answer = generate_text(model, tokenizer, more, again, draft=draft, cache=text.cache)
        assert torch.equal(answer.sequence, second)
        assert answer.reused_tokens == (0 if family == "mixtral" else len(text.sequence) - 1)


def test_a_draft_samples_as_the_seed_has_it(tmp_path: Path) -> None:
    save_model("olmoe", tmp_path / "model")
    model, tokenizer = load(str(tmp_path / "model"), **ON_CPU), load_tokenizer(shape="tiny")
    _, draft = drafts_of(tmp_path / "model", tmp_path / "other")
    texts = [
        generate_text(
            model,
            tokenizer,
            torch.arange(5, 14),
            TextOptions(max_new_tokens=16, temperature=1, seed=seed, draft="b"),
            draft=draft,
        ).sequence.tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_ram_that_a_draft_takes_is_taken_from_the_models() -> None:
    draft, left = load_draft("demo", SOURCE, Options(threads=2, ram="1GiB"))
    assert left.ram == 2**30 - draft_bytes(draft)
    assert draft_bytes(draft) > 2**20
    assert load_draft("demo", SOURCE, ENGINE)[1] is ENGINE
    with pytest.raises(MoestroError):
        load_draft("demo", SOURCE, Options(threads=2, ram="1MiB"))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_beams": 3}, "num_beams 3"),
        ({"use_cache": False}, "use_cache False"),
        ({"cache_implementation": "static"}, "cache_implementation static"),
        ({"guidance_scale": 1.5}, "guidance_scale 1.5"),
    ],
)
def test_settings_that_do_not_go_with_a_draft(settings: dict[str, Any], found: str) -> None:
    own = GenerationConfig(**settings)
    with pytest.raises(RequestError, match=found):
        choose(TextOptions(draft="small"), own, 512)
    choose(TextOptions(), own, 512)


def test_a_draft_goes_before_the_checkpoints_own_guesses() -> None:
    choices = choose(TextOptions(draft="small"), GenerationConfig(prompt_lookup_num_tokens=3), 512)
    assert choices.arguments["prompt_lookup_num_tokens"] is None
    assert choices.goes_back


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Checkpoints with a tokenizer, whose weights are damaged so that loading one would fail."""

    def made(family: str, sizes: dict[str, Any] | None = None, name: str = "") -> str:
        path = tmp_path / (name or family)
        save_model(family, path, sizes or {})
        toy_tokenizers.llama().save_pretrained(path)
        for weights in path.glob("*.safetensors"):
            weights.write_bytes(b"no weights")
        return str(path)

    return made


def _refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["moestro", "run", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_refusals_before_a_model_loads(
    folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, status 2."""
    plain, recurrent, larger = folder("olmoe"), folder("qwen3_next"), folder("olmoe", {"vocab_size": 160}, "larger")
    indexed, image, own = folder("deepseek_v32"), folder("glm4v_moe"), folder("minimax_m3_vl_text")
    lookup = ("--draft", plain, "--prompt-lookup", "3")
    for arguments, wanted in (
        ((plain, "a", "--draft", plain, "--num-beams", "4"), ["--draft", "4 beams"]),
        ((plain, "a", *lookup), ["--draft", "--prompt-lookup 3"]),
        ((plain, "a", "--draft", "demo"), ["another tokenizer", plain, "demo"]),
        ((plain, "a", "--draft", larger), ["160 rows", "128", larger, plain]),
        ((recurrent, "a", "--draft", plain), ["Qwen3NextForCausalLM", "wrong guesses"]),
        ((plain, "a", "--draft", recurrent), ["Qwen3NextForCausalLM", "wrong guesses"]),
        ((recurrent, "a", "--prompt-lookup", "3"), ["--prompt-lookup", "wrong guesses"]),
        ((indexed, "a", "--prompt-lookup", "3"), ["--prompt-lookup", "DeepseekV32ForCausalLM"]),
        ((own, "a", "--draft", plain), ["MiniMaxM3", "wrong guesses"]),
        ((image, "a", "--draft", plain), ["olmoe", "glm4v_moe", "same family"]),
        ((plain, "a", "--draft", "no-such-model-here"), ["no-such-model-here"]),
        ((plain, "a", "--draft", ""), ["--draft"]),
    ):
        line = _refused(monkeypatch, capsys, *arguments)
        assert all(word in line for word in wanted), line


def test_a_run_says_what_a_draft_brought(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for more in ([], ["--draft", "demo"]):
        options = ["-n", "12", "--temperature", "0", "--dtype", "float32", "--json", *more]
        monkeypatch.setattr(sys, "argv", ["moestro", "run", "demo", "Once upon a time", *options])
        with pytest.raises(SystemExit):
            main()
        out = capsys.readouterr()
        figures = json.loads(out.out.splitlines()[-1])
        texts.append(figures["text"])
        if more:
            assert figures["assisted"].keys() == {"steps", "accepted_tokens", "drafted_tokens"}
            assert 0 < figures["assisted"]["accepted_tokens"] <= figures["assisted"]["drafted_tokens"]
            assert "draft   demo:" in out.err
            assert "generation_config" not in out.err  # of how Transformers calls itself
        else:
            assert figures["assisted"] is None
    assert texts[0] == texts[1]
