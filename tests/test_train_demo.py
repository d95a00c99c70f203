"""The training recipe: an interrupted run ends in the bits of an uninterrupted one; what it writes loads."""

import importlib.util
import lzma
import random
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_demo.py"
STEPS = 30


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


train_demo = load_script()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small is slower on more, and the bits of a sum follow their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kB of sentences with a grammar that a tiny model can begin to learn."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("stories")
    for name, lines in (("train.txt", 150), ("heldout.txt", 40)):
        sentences = ["<|book|>"]
        for _ in range(lines):
            who, where = draw.choice(["fox", "king", "witch"]), draw.choice(["wood", "tower", "river"])
            sentences.append(f"Once the {who} went down to the {where}, and the {who} was glad.")
        (folder / name).write_text("\n".join(sentences) + "\n")
    return folder


def test_texts_may_be_compressed(stories: Path, tmp_path: Path) -> None:
    """As the one that the demo was trained on is; what is no whole file of it is said in a line."""
    packed = lzma.compress((stories / "train.txt").read_bytes())
    (tmp_path / "t.xz").write_bytes(packed)
    assert train_demo.read_text(tmp_path / "t.xz") == train_demo.read_text(stories / "train.txt")
    for broken in (packed[:-1], packed[:40], b"", b"plain", b"\0" * 100):
        (tmp_path / "t.xz").write_bytes(broken)
        with pytest.raises(train_demo.UserError, match="no xz file, or cut short"):
            train_demo.read_text(tmp_path / "t.xz")
    corpus = train_demo.read_text(Path(__file__).parents[1] / "data/stories/train.txt.xz")
    assert corpus.startswith("<|book|>")
    assert corpus.count("<|book|>\n") == 44


def run(stories: Path, *arguments: str, batch_tokens: int = 128) -> Result:
    texts = ["--corpus", str(stories / "train.txt"), "--heldout", str(stories / "heldout.txt")]
    shape = ["--size", "tiny", "--context", "32", "--batch-tokens", str(batch_tokens), "--device", "cpu"]
    length = ["--tokens", str(STEPS * 128), "--lr", "0.01"]
    return CliRunner().invoke(train_demo.app, [*texts, *shape, *length, *arguments])


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """An uninterrupted run: its directory and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "model"
    result = run(stories, "--out", str(out))
    assert result.exit_code == 0, result.output
    return out, result


def test_interrupted_run_ends_in_the_same_bits(stories, whole, tmp_path, monkeypatch):
    out = tmp_path / "model"
    schedule = train_demo.learning_rate
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(step: int, steps: int, peak: float) -> float:
        if step == 13:
            signal.raise_signal(signal.SIGINT)
        return schedule(step, steps, peak)

    monkeypatch.setattr(train_demo, "learning_rate", interrupted)
    result = run(stories, "--out", str(out))
    assert result.exit_code == 130
    assert "saved at step 14" in result.output
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]
    assert checkpoint(out)["step"] == 14

    monkeypatch.undo()
    torch.manual_seed(99)  # the state of this process must not matter
    assert run(stories, "--out", str(out)).exit_code == 0
    ours, theirs = checkpoint(out), checkpoint(whole[0])
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["model"].keys() == theirs["model"].keys()
    for name, weight in theirs["model"].items():
        assert torch.equal(ours["model"][name], weight), name
    for index, moments in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][index][key], moments[key]) for key in moments)
    assert (out / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def perplexities(result: Result) -> list[float]:
    return [float(line.split()[0]) for line in result.stdout.splitlines()[-6:-3]]


def test_time_limit_saves_and_training_lowers_the_perplexity(stories, whole, tmp_path):
    result = run(stories, "--out", str(tmp_path / "model"), "--minutes", "0")
    assert result.exit_code == 0
    assert "saved at step 0" in result.output
    assert (tmp_path / "model" / "model.safetensors").exists()
    for untrained, trained in zip(perplexities(result), perplexities(whole[1]), strict=True):
        assert untrained > 250  # of a vocabulary of 320
        assert trained < 60


def test_written_model_loads(stories, whole):
    out, _ = whole
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert tokenizer.bos_token == tokenizer.eos_token == "<|book|>"
    assert tokenizer.pad_token == "<|pad|>"
    text = "Once the king went down"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= ids.shape[1] + 4


def test_evaluate_prints_the_figures_of_the_run(stories, whole):
    out, trained = whole
    result = run(stories, "--evaluate", str(out))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 7
    assert lines == trained.stdout.splitlines()[-7:]
    hottest, coldest = (float(line.split()[0]) for line in lines[5:])
    assert 0 <= coldest <= 1 <= hottest <= 2  # top 2 of 4 experts: none works more than 2 x the mean


def test_balance_loss_sees_each_layer_by_itself():
    """Two layers that each use only their own 2 of 4 experts: balanced in the average, not in any layer."""
    tap = train_demo.RouterTap.__new__(train_demo.RouterTap)
    low, high = torch.tensor([[9.0, 9.0, 0.0, 0.0]] * 8), torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 8)
    tap.layers = {0: (low, low.topk(2).indices), 1: (high, high.topk(2).indices)}
    assert tap.balance_loss().item() == pytest.approx(2 * 2, rel=1e-2)  # 1 a layer would be balance
    flat = torch.zeros(8, 4)
    chosen = torch.arange(16).reshape(8, 2) % 4
    tap.layers = {0: (flat, chosen), 1: (flat, chosen)}
    assert tap.balance_loss().item() == pytest.approx(2)


def test_learning_rate_warms_up_and_falls():
    rates = [train_demo.learning_rate(step, 400, 1.0) for step in range(400)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "no/such.txt", "--out", "{new}"], "cannot read no/such.txt"),
        (["--heldout", "no/such.txt", "--evaluate", "{whole}"], "cannot read no/such.txt"),
        (["--out", "{whole}", "--seed", "7"], "was begun with --seed 0"),
        (["--out", "{whole}", "--corpus", "{heldout}"], "was begun with another text"),
        (["--out", "{stories}"], "has files but no checkpoint.pt"),
        (["--out", "{new}", "--context", "30"], "no multiple of --context 30"),
        (["--evaluate", "{stories}"], "not a Hugging Face checkpoint"),
        ([], "give --out DIR"),
    ],
)
def test_bad_input_is_one_line_and_status_2(stories, whole, tmp_path, arguments, message):
    names = {
        "stories": stories,
        "whole": whole[0],
        "heldout": stories / "heldout.txt",
        "new": tmp_path / "new",
    }
    before = (whole[0] / "checkpoint.pt").stat()
    result = run(stories, *(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "new").exists()
    assert (whole[0] / "checkpoint.pt").stat() == before


def test_broken_checkpoint_is_named(stories, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    result = run(stories, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is not a checkpoint of this script" in result.stderr
    assert run(stories, "--out", str(tmp_path), "--no-resume", "--minutes", "0").exit_code == 0
