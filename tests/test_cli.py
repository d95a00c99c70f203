"""The command line as a user meets it: text on standard output, figures on standard error, JSON last."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moestro
from moestro.cli import main as cli
from moestro.planning.budget import parse_bytes
from moestro.planning.policies import POLICIES
from moestro.simulate.trace import Trace

DEMO = str(Path(moestro.__file__).parent / "demo")
PROMPT = "Once upon a time"
BENCHES = ("load", "kernels", "decode", "policies", "hybrid", "host", "recall", "quantization")


def _run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["moestro", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    return printed.out, printed.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    return lambda *arguments: _run(capsys, monkeypatch, *arguments)


def _reference(prompt: str, **options: object) -> str:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=20, do_sample=False, **options)[0, ids.input_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_run_prints_text_and_figures(run) -> None:  # type: ignore[no-untyped-def]
    out, err = run("run", "demo", PROMPT, "-n", "20", "--temperature", "0", "--dtype", "float32")
    assert out == f"{PROMPT}{_reference(PROMPT)}\n"
    assert re.search(r"prompt +4 tokens read at [\d.]+ tokens a second; the answer began after [\d.]+ s", err)
    assert re.search(r"answer +20 tokens written at [\d.]+ tokens a second\n", err)
    assert re.search(r"memory +[\d.]+ [MG]iB of RAM at most", err)


def test_json_is_the_last_line(run) -> None:  # type: ignore[no-untyped-def]
    out, _ = run("run", "demo", PROMPT, "-n", "20", "--temperature", "0", "--dtype", "float32", "--json")
    figures = json.loads(out.splitlines()[-1])
    assert figures["text"] == _reference(PROMPT)
    assert figures["new_tokens"] == 20
    assert figures["prefill_tok_s"] == pytest.approx(4 / figures["ttft_s"])
    assert figures["decode_tok_s"] > 0
    assert figures["peak_bytes"]["ram"] > parse_bytes("20MB")
    assert figures["peak_bytes"]["gpu"] == 0


def test_a_virtual_clock_gives_real_text_at_modelled_speed(run) -> None:  # type: ignore[no-untyped-def]
    """The same figures each time: nothing of this machine's speed is in them."""
    how = [
        "--device",
        "emulated",
        "--clock",
        "virtual",
        "--machine",
        "rtx4090",
        "--policy",
        "lru",
        "--dtype",
        "float32",
    ]
    told = [
        run("run", "demo", PROMPT, "-n", "20", "--temperature", "0", "--gpu-memory", "24MiB", *how) for _ in range(2)
    ]
    assert told[0][0] == told[1][0] == f"{PROMPT}{_reference(PROMPT)}\n"
    figures = [re.findall(r"(?m)^(?:prompt|answer|experts) .*", err) for _, err in told]
    assert figures[0] == figures[1]
    assert re.search(r"experts +[\d.]+% of those that were needed were on the GPU; [\d.]+ MiB copied there", told[0][1])


def test_trace_replay_and_their_benches(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text, trace, timeline = tmp_path / "story.txt", str(tmp_path / "demo.trace"), tmp_path / "timeline.json"
    text.write_text("Once upon a time there was a king who had three daughters, and the youngest was a goose. " * 20)
    pieces = ["--tokens", "24", "--prompt-tokens", "8", "--decode-tokens", "6"]
    out, _ = run("trace", "demo", "--text", str(text), "-o", trace, *pieces)
    assert "demo: 6 layers of 8 experts, top-2; 32 prompt tokens, 24 decoded" in out
    assert "recall 3 layers ahead" in out
    size = ["--as-shape", "mixtral-8x7b", "--bits", "4", "--machine", "rtx4090"]
    out, _ = run("replay", trace, "--policy", "lru", *size, "--timeline", str(timeline), "--profile", trace)
    assert re.search(r"decode +[\d.]+ tok/s +24 tokens +hit \d+, joined 0, miss \d+", out)
    assert json.loads(timeline.read_text())["traceEvents"]
    found = json.loads(run("replay", trace, "--policy", "moestro", *size, "--json")[0])
    assert found["lanes"].keys() == {"cpu", "gpu", "link", "disk"}

    rows = json.loads(run("bench", "policies", "--trace", trace, *size, "--json")[0].splitlines()[-1])["rows"]
    names = ["policy", "prefill_tok_s", "decode_tok_s", "hit_rate", "bytes_moved", "share"]
    assert [list(row)[:6] for row in rows] == [names] * len(POLICIES)
    profiled = run("bench", "policies", "--trace", trace, *size, "--profile", trace, "--policy", "fiddler", "--json")[0]
    lone = json.loads(run("replay", trace, "--policy", "fiddler", *size, "--profile", trace, "--json")[0])
    (row,) = json.loads(profiled.splitlines()[-1])["rows"]
    assert row["decode_tok_s"] == pytest.approx(lone["decode_tok_s"])
    assert row["decode_tok_s"] != rows[list(POLICIES).index("fiddler")]["decode_tok_s"]  # of the second half alone
    live = [
        "--live",
        "--gpu-memory",
        "12MiB",
        "--machine",
        "rtx4090",
        "--policy",
        "lru",
        "--policy",
        "cpu-only",
        "--json",
    ]
    rows = json.loads(run("bench", "policies", "demo", "--text", str(text), *pieces, *live)[0].splitlines()[-1])["rows"]
    assert [(row["policy"], row["hit_rate"] > 0) for row in rows] == [("lru", True), ("cpu-only", False)]
    assert 0 < rows[0]["share"] < rows[1]["share"] <= 1 + 1e-9
    out, _ = run("bench", "recall", "demo", "--text", str(text), *pieces)
    assert "LRU hit ratio" in re.sub(r"\s+", " ", out)

    run("run", "demo", PROMPT, "-n", "5", "--trace", trace)
    assert sum(one.tokens for one in Trace.load(Path(trace)).passes) == 4 + 4


def test_beams(run) -> None:  # type: ignore[no-untyped-def]
    out, err = run("run", "demo", PROMPT, "-n", "20", "--num-beams", "4", "--dtype", "float32")
    assert out == f"{PROMPT}{_reference(PROMPT, num_beams=4)}\n"
    assert "answer " in err


def test_guesses_from_the_prompt_leave_the_text_as_it_is(run) -> None:  # type: ignore[no-untyped-def]
    prompt = f"{PROMPT} {PROMPT} {PROMPT}"
    options = "-n", "20", "--temperature", "0", "--dtype", "float32"
    plain, _ = run("run", "demo", prompt, *options)
    assert run("run", "demo", prompt, *options, "--prompt-lookup", "4")[0] == plain


def test_the_same_seed_gives_the_same_text(run) -> None:  # type: ignore[no-untyped-def]
    texts = [run("run", "demo", PROMPT, "-n", "20", "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_options_reach_generate(run) -> None:  # type: ignore[no-untyped-def]
    greedy = run("run", "demo", PROMPT, "-n", "20", "--temperature", "0")[0]
    for option in (["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1.0"]):
        assert run("run", "demo", PROMPT, "-n", "20", "--temperature", "1", *option)[0] == greedy
    assert run("run", "demo", PROMPT, "-n", "20", "--temperature", "0", "--repetition-penalty", "1.5")[0] != greedy


def test_a_stop_string_ends_the_text_and_is_not_in_it(run) -> None:  # type: ignore[no-untyped-def]
    whole = run("run", "demo", PROMPT, "-n", "20", "--temperature", "0")[0]
    word = whole[len(PROMPT) :].split()[6]
    cut = run("run", "demo", PROMPT, "-n", "20", "--temperature", "0", "--stop", word, "--stop", "@@")[0]
    assert cut == whole[: whole.index(word, len(PROMPT))] + "\n"


@pytest.mark.parametrize("arguments", [("run", "demo", "-"), ("run", "demo")])
def test_the_prompt_comes_from_a_pipe(run, arguments, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    out, _ = run(*arguments, "-n", "20", "--temperature", "0", "--dtype", "float32")
    assert out == f"{PROMPT}{_reference(PROMPT)}\n"


def test_the_end_of_the_context_ends_the_text_and_is_said(run) -> None:  # type: ignore[no-untyped-def]
    out, err = run("run", "demo", "and so on " * 169, "-n", "100", "--temperature", "0")
    assert out
    assert "; the context is full" in err


def test_random_shapes_and_the_emulated_device(run) -> None:  # type: ignore[no-untyped-def]
    arguments = ("run", "--shape", "tiny", "Hello", "-n", "5", "--temperature", "0", "--json")
    plain = json.loads(run(*arguments)[0])
    split = json.loads(run(*arguments, "--device", "emulated", "--policy", "layer-split")[0])
    assert plain["text"] == split["text"]
    assert plain["new_tokens"] == 5
    assert split["peak_bytes"]["gpu"] > 0


def test_doctor(run) -> None:  # type: ignore[no-untyped-def]
    out, _ = run("doctor")
    for word in ("torch", "transformers", "ram", "gpu", "expert kernels", "default policy"):
        assert re.search(rf"^{word} ", out, re.MULTILINE), word
    assert json.loads(run("doctor", "--json")[0])["torch"] == torch.__version__


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["chat"], ["trace"], ["replay"], ["doctor"], ["bench"], *(["bench", name] for name in BENCHES)],
)
def test_help_has_an_example_and_a_default_for_each_flag(run, command: list[str]) -> None:  # type: ignore[no-untyped-def]
    out, _ = run(*command, "--help")
    text = re.sub(r"\s+", " ", out)
    assert "Example: moestro" in text or command == ["bench"]
    for flag in re.findall(r"  (?:-\w, )?(--[a-z-]+) <?[A-Za-z]", out):
        description = text.split(flag, 1)[1].split(" --")[0]
        assert "[default:" in description or "[required]" in description, (command, flag)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_is_quick(arguments: list[str]) -> None:
    """At most three times its libraries' start, in CPU seconds, of which the least of five counts."""

    def least_s(*line: str) -> float:
        found = []
        for _ in range(5):
            before = os.times()
            subprocess.run([sys.executable, *line], check=True, capture_output=True)
            after = os.times()
            found.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return min(found)

    assert least_s("-m", "moestro.cli.main", *arguments) < 3 * least_s("-c", "import typer, rich.console")


class Terminal:
    """`moestro` in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.text = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "moestro.cli.main", *arguments])

    def wait_for(self, pattern: str, timeout_s: float = 60) -> str:
        """Read until the pattern comes; what was read up to its end is given and dropped."""
        end_s = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.text)):
            assert select.select([self._fd], [], [], max(0, end_s - time.monotonic()))[0], self.text
            try:
                self.text += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:  # the program has gone
                assert re.search(pattern, self.text), self.text
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    chat = Terminal("chat", "--shape", "tiny", "-n", "1500", "--figures")
    chat.wait_for("Ctrl-D leaves")
    chat.wait_for(">")
    chat.type("Tell me a long story\r")
    chat.wait_for(r"story[^\n]*\n[\s\S]{60}")
    os.kill(chat.pid, signal.SIGINT)
    figures = chat.wait_for(r"answer .*?(\d+) tokens")
    assert int(re.findall(r"(\d+) tokens", figures)[-1]) < 1400
    chat.wait_for(">")
    chat.type("/new\r")
    chat.wait_for("the conversation is forgotten")
    chat.wait_for(">")
    chat.type("half a message\x03")
    chat.wait_for("Ctrl-D leaves")
    chat.wait_for(">")
    chat.type("\x04")
    assert chat.status() == 0


def test_ctrl_c_in_run_leaves_at_once() -> None:
    run = Terminal("run", "--shape", "tiny", "Hello", "-n", "2000")
    run.wait_for("Hello.{10}")
    os.kill(run.pid, signal.SIGINT)
    assert run.status() == 130
