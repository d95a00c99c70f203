"""Bad input gets one clear line and exit status 2: what was found, what was needed, what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import moestro
from moestro.cli import main as cli

PLOT_SAYS = "a.svg cannot be written" if find_spec("matplotlib") else "--plot needs matplotlib"

DEMO = Path(moestro.__file__).parent / "demo"


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    """A checkpoint of its own in Mixtral's published format, with the demo's tokenizer; to be spoiled."""
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    folder = tmp_path / "checkpoint"
    MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def _fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run the command line in this process; the one line that it printed before leaving with status 2."""
    monkeypatch.setattr(sys, "argv", ["moestro", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert printed.out == "" or "--json" not in arguments
    return lines[0]


def _remove_tensor(folder: Path, name: str) -> None:
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    path = folder / index["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])


def _empty_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def _drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def _drop_all_shards(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def _not_numbers(folder: Path) -> None:
    path = next(p for p in sorted(folder.glob("*.safetensors")) if any("lm_head" in k for k in load_file(p)))
    save_file({k: v * float("nan") for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def _empty_pickle(folder: Path) -> None:
    _drop_all_shards(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

# Which tensor is found first depends on the version of Transformers.
MISSHAPEN = r"have shapes other than its config says|checkpoint and its config.json do not belong together"

SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard cut short": (_cut_shard, "is damaged or cut short"),
    "shard empty": (_empty_shard, "is damaged or cut short"),
    "shard absent": (_drop_shard, "which its index names; download it again"),
    "no weights at all": (_drop_all_shards, "has no weights: .*; name one that has"),
    "one expert's matrix missing": (lambda f: _remove_tensor(f, EXPERT), "mlp.experts.down_proj"),
    "a gate and up mismatch": (lambda f: _remove_tensor(f, EXPERT.replace("w2", "w1")), "mlp.experts.gate_up_proj"),
    "a dense tensor missing": (
        lambda f: _remove_tensor(f, "model.layers.0.self_attn.k_proj.weight"),
        "has no model.layers.0.self_attn.k_proj.weight; it is incomplete",
    ),
    "config says another size": (lambda f: _edit_config(f, hidden_size=48), MISSHAPEN),
    "config says more experts": (lambda f: _edit_config(f, num_local_experts=5), MISSHAPEN),
    "config says more layers": (lambda f: _edit_config(f, num_hidden_layers=3), "model.layers.2"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config has no numbers": (lambda f: _edit_config(f, hidden_size="big"), "error"),
    "config divides by zero": (lambda f: _edit_config(f, num_attention_heads=0), "error"),
    "config has no such dtype": (lambda f: _edit_config(f, dtype="foo"), "error"),
    "config asks for too many experts": (lambda f: _edit_config(f, num_experts_per_tok=9), "to 9 of 4 experts"),
    "index is no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is no index of weights"),
    "index is a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is no index of weights"),
    "weights are not numbers": (_not_numbers, "the model's output is not a number"),
    "an empty pickle": (_empty_pickle, "cannot be loaded"),
    "config absent": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "unknown family": (lambda f: _edit_config(f, model_type="nosuchmodel"), "nosuchmodel"),
    "quantized already": (
        lambda f: _edit_config(f, quantization_config={"quant_method": "fp8"}),
        "says that it is quantized \\(fp8\\), but none of its tensors is",
    ),
    "tokenizer absent": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_checkpoint(
    how: str, demo_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, says = SPOILED[how]
    spoil(demo_copy)
    assert re.search(says, _fails(capsys, monkeypatch, "run", str(demo_copy), "Once", "--json"))


@pytest.mark.parametrize(
    ("name", "called"),
    [
        (EXPERT, "model.layers.1.mlp.experts, expert 2, down"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_weight_that_cannot_be_quantized(
    name: str, called: str, demo_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = demo_copy / json.loads((demo_copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][3, 5] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    says = _fails(capsys, monkeypatch, "run", str(demo_copy), "Once", "--bits", "4", "--json")
    assert f"error: {called}: a weight is inf, in row 3 and column 5 of its matrix" in says


def test_an_unspoiled_checkpoint_of_several_shards_runs(
    demo_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list(demo_copy.glob("*.safetensors"))) > 2
    weight_map = json.loads((demo_copy / "model.safetensors.index.json").read_text())["weight_map"]
    assert EXPERT in weight_map  # Mixtral's published names
    monkeypatch.setattr(sys, "argv", ["moestro", "run", str(demo_copy), "Once", "-n", "3", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_tokens"] == 3


def test_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=40, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    assert "llama is a dense model" in _fails(capsys, monkeypatch, "run", str(tmp_path), "Once")


def test_experts_that_do_not_pass_through_the_interface(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=40
    )
    JetMoeForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    says = _fails(capsys, monkeypatch, "run", str(tmp_path), "Once")
    assert "the experts of jetmoe do not pass through Transformers' experts interface" in says


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "./nowhere", "x"], "no folder ./nowhere; name a checkpoint's folder, a hub id like org/name, or demo"),
        (["run", "a/b/c", "x"], "no folder a/b/c"),
        (["run", "no such model!", "x"], "no folder no such model!"),
        (["run"], "name one model: a folder, a hub id, demo, or a shape"),
        (["run", "demo"], "no prompt"),
        (["run", "", "--shape", "tiny"], "the prompt is empty, and this model's tokenizer has no token to begin"),
        (
            ["run", "demo", "x", "--ram", "20MiB"],
            "the model needs 22.9 MiB of RAM (experts 20.2 MiB), but --ram allows",
        ),
        (["run", "demo", "x", "--ram", "lots"], "--ram 'lots' is no amount of memory"),
        (["run", "demo", "x", "--policy", "wishful"], "no policy 'wishful'; there are: bandwidth-split, cpu-only"),
        (["run", "demo", "x", "--machine", "abacus"], "no machine 'abacus'; there are: t4-colab, rtx3060"),
        (["run", "demo", "x", "--clock", "virtual"], "--clock virtual needs --device emulated and --machine NAME"),
        (["run", "demo", "x", "--trace", "/nowhere/t"], "/nowhere/t cannot be written (No such file or directory)"),
        (["trace", "demo", "--text", "/nowhere.txt"], "the text /nowhere.txt cannot be read"),
        (["replay", "/nowhere.trace"], "the trace /nowhere.trace cannot be read: No such file"),
        (["replay", __file__], "is no trace of Moestro's; make one with: moestro trace"),
        (["bench", "policies", "--policy", "wishful"], "no policy 'wishful'"),
        (["bench", "policies", "--trace", __file__, "demo"], "--trace has its own model and text"),
        (["bench", "policies", "demo", "--live", "--as-shape", "tiny"], "--live runs the model itself; leave --trace"),
        (["bench", "recall", "demo", "--plot", "/nowhere/a.svg"], PLOT_SAYS),
        (["trace", "demo", "--text", __file__, "-o", "/nowhere/t"], "/nowhere/t cannot be written"),
        (["bench", "host", "--slots", "1.5"], "--slots 1.5: a share of the experts is wanted, from 0 to below 1"),
        (["bench", "host", "--shape", "small"], "no shape 'small'; there are: deepseek-v3, "),
        (["bench", "recall"], "name one model: a folder, a hub id, demo, or a shape"),
        (["run", "demo", "x", "--device", "tpu"], "no device 'tpu'"),
        (["run", "demo", "x", "--dtype", "int3"], "no dtype 'int3'"),
        (["run", "demo", "x", "--threads", "0"], "--threads 0: needs 1 to "),
        (["run", "demo", "x", "--threads", "100000"], "--threads 100000: needs 1 to "),
        (["run", "demo", "x", "--context", "0"], "--context 0: needs at least 2, a token of prompt and of answer"),
        (["chat", "demo", "--context", "-5"], "--context -5: needs at least 2"),
        (["run", "demo", "x", "--context", "513"], "--context 513, but the model's context is 512; ask for less"),
        (["run", "demo", "x", "--seed", "-1"], "--seed -1: needs 0 or more"),
        (["run", "demo", "x", "--temperature", "1e-300"], "needs 0, or at least 0.01"),
        (["run", "demo", "x", "-n", "0"], "--max-new-tokens 0: needs at least 1"),
        (["run", "demo", "x", "--temperature", "-1"], "--temperature -1.0: needs 0, or at least 0.01"),
        (["run", "demo", "x", "--top-p", "1.5"], "--top-p 1.5: needs above 0 and at most 1"),
        (["run", "demo", "x", "--num-beams", "0"], "--num-beams 0: needs at least 1"),
        (["run", "demo", "x", "--shape", "tiny"], "both MODEL (demo) and --shape (tiny)"),
        (["run", "x", "--shape", "huge"], "no shape 'huge'"),
        (["run", "demo", "word " * 600], "tokens, but the model's context is 512; shorten it"),
        (["bench", "load", "--size", "much"], "--size 'much' is no amount of memory"),
    ],
)
def test_a_bad_request(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert says in _fails(capsys, monkeypatch, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--gpu-memory", "1GiB"], "--gpu-memory was given, but there is no GPU here"),
        (["--device", "cuda"], "torch sees no CUDA GPU here; use --device cpu or emulated"),
    ],
)
def test_a_gpu_is_asked_for_and_there_is_none(
    option: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert says in _fails(capsys, monkeypatch, "run", "demo", "x", *option)


def test_a_hub_id_that_is_not_there_in_a_fresh_process() -> None:
    """The whole command, with the hub out of reach as it is for most users of a wrong id."""
    done = subprocess.run(
        [sys.executable, "-m", "moestro.cli.main", "run", "no-such-org/no-such-model", "Once"],
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no model no-such-org/no-such-model: no folder")
    assert "Traceback" not in done.stderr


def test_tensors_that_the_config_has_no_place_for_are_said(
    demo_copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _edit_config(demo_copy, num_hidden_layers=1)
    monkeypatch.setattr(sys, "argv", ["moestro", "run", str(demo_copy), "Once", "-n", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "tensors that its config has no place for, such as model.layers.1" in caplog.text


def test_a_damaged_file_that_is_not_read_does_no_harm(demo_copy: Path) -> None:
    (demo_copy / "extra.safetensors").write_bytes(b"x")
    assert moestro.load(str(demo_copy), threads=1, device="cpu").moestro.store.n_bytes


NO_TEXT = {
    "a pipe": (["run", "demo", "-"], b"caf\xe9 x"),
    "an argument": (["run", "demo", "\udcff abc"], b""),
    "a message": (["chat", "demo"], b"hi \xff\n"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.long] if at else []) for at, way in enumerate(NO_TEXT)]
)
def test_input_that_is_no_text(way: str) -> None:
    arguments, given = NO_TEXT[way]
    command = [sys.executable, "-m", "moestro.cli.main", *arguments, "-n", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=given, capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].split(b"error: ")[-1].startswith(b"the tokenizer cannot encode")
