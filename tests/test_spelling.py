"""A message names an option as the user wrote it: `bits=5` of `load`, `--bits 5` of the command line."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moestro
from moestro.cli.main import main
from moestro.errors import MoestroError
from moestro.planning.options import ModelOptions, Options
from moestro.planning.spelling import as_flags, flag, spelled

PACKAGE = Path(moestro.__file__).parent
DEMO = PACKAGE / "demo"

# What options together, or with a model or machine, are refused for: arguments, what `load` says, what `run` says.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "clock": (
        {"clock": "virtual"},
        "clock='virtual' needs device='emulated' and machine='NAME', whose time it models",
        "--clock virtual needs --device emulated and --machine NAME, whose time it models",
    ),
    "pack_dense": (
        {"pack_dense": False, "dense_bits": 8},
        "dense_bits and head_bits are for packed layers; leave them or pack_dense=False out",
        "--dense-bits and --head-bits are for packed layers; leave them or --no-pack-dense out",
    ),
    "device": (
        {"device": "cuda"},
        "device='cuda', but torch sees no CUDA GPU here; use device='cpu' or emulated",
        "--device cuda, but torch sees no CUDA GPU here; use --device cpu or emulated",
    ),
    "link": (
        {"device": "cpu", "link": "12GB/s"},
        "link needs a device with a link; use it with device='cuda' or emulated",
        "--link needs a device with a link; use it with --device cuda or emulated",
    ),
    "gpu_memory": (
        {"device": "cpu", "gpu_memory": "1GiB"},
        "gpu_memory was given, but there is no GPU here; leave it out or use device='emulated'",
        "--gpu-memory was given, but there is no GPU here; leave it out or use --device emulated",
    ),
    "gpu_memory, too little": (
        {"device": "emulated", "gpu_memory": "2MiB", "context": 64},
        r"but gpu_memory allows 2\.0 MiB; give it at least [\d.]+MiB",
        r"but --gpu-memory allows 2\.0 MiB; give it at least [\d.]+MiB",
    ),
    "gpu_memory, of a named machine": (
        {"device": "emulated", "clock": "virtual", "machine": "rtx4090", "gpu_memory": "900GiB"},
        r"gpu_memory 900\.0 GiB, but rtx4090 has 24\.0 GiB; ask for less",
        r"--gpu-memory 900\.0 GiB, but rtx4090 has 24\.0 GiB; ask for less",
    ),
    "ram": (
        {"device": "cpu", "ram": "2MiB"},
        r"but ram allows 2\.0 MiB; give ram at least [\d.]+MiB",
        r"but --ram allows 2\.0 MiB; give --ram at least [\d.]+MiB",
    ),
    "ram, without a unit": (
        {"ram": "5"},
        "ram='5' has no unit, and would be 5 bytes; did you mean 5GiB?",
        "--ram 5 has no unit, and would be 5 bytes; did you mean 5GiB?",
    ),
    "context": (
        {"device": "cpu", "context": 4096},
        "context=4096, but the model's context is 512; ask for less",
        "--context 4096, but the model's context is 512; ask for less",
    ),
    "transcode": (
        {"transcode": 8},
        "transcode=8 is for GGUF files, and demo is none; leave it out",
        "--transcode 8 is for GGUF files, and demo is none; leave it out",
    ),
    "dense_bits": (
        {"device": "emulated", "dense_bits": 8},
        "dense_bits=8 needs the dense layers on the CPU; use device='cpu', or leave it out",
        "--dense-bits 8 needs the dense layers on the CPU; use --device cpu, or leave it out",
    ),
    "config, of a packed folder": (
        {"model": "packed", "config": "demo"},
        "is a packed folder, which has a config of its own; leave config out",
        "is a packed folder, which has a config of its own; leave --config out",
    ),
    "bits, of a packed folder": (
        {"model": "packed", "expert_bits": 4},
        r"not with expert_bits=4 \(which bits sets, too\); leave it out",
        r"not with --expert-bits 4 \(which --bits sets, too\); leave it out",
    ),
    "dtype, of a packed folder": (
        {"model": "packed", "dtype": "float32"},
        "is packed in bfloat16, not float32; leave dtype out",
        "is packed in bfloat16, not float32; leave --dtype out",
    ),
    "trust_remote_code": (
        {"model": "own code"},
        "needs code of its own .* then give trust_remote_code=True",
        "needs code of its own .* then give --trust-remote-code",
    ),
    "quantization": (
        {"model": "quantized"},
        "use the model's unquantized checkpoint with bits 8, 4, 3 or 2",
        "use the model's unquantized checkpoint with --bits 8, 4, 3 or 2",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders for the models that the table names."""
    from moestro.loading.pack import pack

    root = tmp_path_factory.mktemp("models")
    pack("demo", root / "packed", ModelOptions(), Options())
    changes = {
        "own code": {"model_type": "ownmoe", "auto_map": {"AutoConfig": "own.Own"}},
        "quantized": {"quantization_config": {"quant_method": "unheard_of"}},
    }
    for name, more in changes.items():
        shutil.copytree(DEMO, root / name)
        config = root / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | more))
    return {name: str(root / name) for name in ("packed", "own code", "quantized")}


def _as_typed(given: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in given.items()
        for part in ([flag(f"no_{name}")] if value is False else [flag(name), str(value)])
    ]


BUILD_A_MODEL = {"gpu_memory", "gpu_memory, of a named machine", "dense_bits", "link", "transcode"}  # twice each


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] if case in BUILD_A_MODEL else []) for case in REFUSED]
)
def test_a_refusal_speaks_of_what_was_given(
    case: str, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, in_python, typed = REFUSED[case]
    if given.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    given = {name: value for name, value in given.items() if name != "model"}
    model = models.get(REFUSED[case][0].get("model", ""), "demo")
    with pytest.raises(MoestroError) as error:
        moestro.load(model, **given)
    assert re.search(in_python if "\\" in in_python or ".*" in in_python else re.escape(in_python), str(error.value))
    assert "--" not in str(error.value)
    monkeypatch.setattr(sys, "argv", ["moestro", "run", model, "x", *_as_typed(given)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(typed if "\\" in typed or ".*" in typed else re.escape(typed), last)


def test_values_are_written_as_they_would_be_typed() -> None:
    cases: list[tuple[Callable[[], str], str, str]] = [
        (lambda: spelled("gpu_memory"), "gpu_memory", "--gpu-memory"),
        (lambda: spelled("bits", 5), "bits=5", "--bits 5"),
        (lambda: spelled("policy", "lru"), "policy='lru'", "--policy lru"),
        (lambda: spelled("profile", " ", quoted=True), "profile=' '", "--profile ' '"),
        (lambda: spelled("fuse", False), "fuse=False", "--no-fuse"),
        (lambda: spelled("trust_remote_code", True), "trust_remote_code=True", "--trust-remote-code"),
        (lambda: spelled("fit", None), "fit=None", "--fit None"),
    ]
    for write, in_python, typed in cases:
        assert write() == in_python
        with as_flags():
            assert write() == typed
            with as_flags():
                assert write() == typed
            assert write() == typed
        assert write() == in_python


# Texts that are about the command line itself, or another program's.
ABOUT_COMMANDS = {
    "loading/outlook.py": 4,  # gains and the command that a plan proposes
    "machine/probe.py": 2,  # nvidia-smi
    "planning/options.py": 5,  # help, in which load's own docstring has names
    "planning/option.py": 1,
    "simulate/trace.py": 1,
    "text/prompt.py": 2,  # --raw and --system are the command line's alone
    "text/templates.py": 2,
}


def test_no_message_below_the_command_line_has_a_flag_in_it() -> None:
    """So that none comes back: each is put together by `spelled`."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(("cli/", "bench/")):
            continue
        if "--" not in (text := path.read_text()):
            continue
        tree = ast.parse(text)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.setdefault(name, []).extend(re.findall(r"(?<![\w-])--[a-z{(\[]\S*", node.value))
    assert {name: len(flags) for name, flags in found.items() if flags} == ABOUT_COMMANDS


def test_the_docstring_of_load_has_its_arguments_names() -> None:
    for function in (moestro.load, moestro.MoestroConfig):
        assert "--" not in (function.__doc__ or "")
