"""examples/lm_eval_harness.py: lm_eval takes our model object, and finds of it what it finds of Transformers' own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moestro

EXAMPLE = Path(__file__).parent.parent / "examples" / "lm_eval_harness.py"
DEMO = Path(moestro.__file__).parent / "demo"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    spec = importlib.util.spec_from_file_location("lm_eval_harness", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def story(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "story.txt"
    path.write_text((DEMO / "heldout.txt").read_text()[:6000])
    return path


def test_it_finds_what_it_finds_of_transformers(example: ModuleType, story: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    models = [moestro.load("demo", device="cpu", dtype="float32", expert_bits=bits) for bits in (16, 4)]
    models.append(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32))
    ours, rounded, alone = (
        example.evaluate(model, tokenizer, [example.text_task(story)], window=256)["story"] for model in models
    )
    assert ours == pytest.approx(alone, rel=1e-4)
    assert 2 < ours["byte_perplexity"] < 5
    assert rounded["byte_perplexity"] != pytest.approx(alone["byte_perplexity"], rel=1e-4)


def test_it_prints_a_line_a_metric(
    example: ModuleType, story: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["demo", "--text", str(story), "--window", "64", "--expert-bits", "8", "--dense-bits", "8"]
    monkeypatch.setattr(sys, "argv", ["lm_eval_harness.py", *arguments])
    example.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    values = {name: float(value) for task, name, value in lines if task == "story"}
    assert values.keys() == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert 2 ** values["bits_per_byte"] == pytest.approx(values["byte_perplexity"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo"], "give --tasks, --text, or both"),
        (["demo", "--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["nowhere", "--text", __file__], "error: "),
        (["demo", "--text", __file__, "--expert-bits", "7"], "error: --expert-bits 7: there are 16"),
    ],
)
def test_bad_input_is_one_line(
    example: ModuleType,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["lm_eval_harness.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
