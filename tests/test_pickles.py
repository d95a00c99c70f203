"""Weights in pickles (.bin): code in one is not run, whichever way it is loaded; each way ends in one line.

And the plain `from_pretrained` line with quantized checkpoints, which `moestro.load` loads and Transformers refuses.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from families import save_model
from moestro import MoestroConfig, MoestroError, load
from moestro.cli import main as cli
from moestro.errors import ModelError
from moestro.loading.contents import inspect_model
from test_loading import ON_CPU


class _Payload:
    """Makes a file when it is unpickled as pickles are."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "a")


def _bare(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(_Payload(mark)))


def _among_tensors(file: Path, mark: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(2), "more": _Payload(mark)}, file)


def _in_the_old_form(file: Path, mark: Path) -> None:
    torch.save({"more": _Payload(mark)}, file, _use_new_zipfile_serialization=False)


def _single(folder: Path, write: Callable[[Path, Path], None], mark: Path) -> None:
    write(folder / "pytorch_model.bin", mark)


def _sharded(folder: Path, write: Callable[[Path, Path], None], mark: Path, index: str = "pytorch_model.bin") -> None:
    """The payload in one of two shards; the other one has all tensors."""
    tensors = load_file(folder / "whole.safetensors")
    torch.save(tensors, folder / "pytorch_model-00001-of-00002.bin")
    write(folder / "pytorch_model-00002-of-00002.bin", mark)
    names = [f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2)]
    of_names = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    (folder / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of_names}))


def _by_the_index_of_others(folder: Path, write: Callable[[Path, Path], None], mark: Path) -> None:
    _sharded(folder, write, mark, "model.safetensors")


def _quantized(folder: Path, write: Callable[[Path, Path], None], mark: Path) -> None:
    _single(folder, write, mark)
    _quantize(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]})


def _quantize(folder: Path, config: dict[str, Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))


def _run(folder: Path) -> None:
    before = sys.argv
    sys.argv = ["moestro", "run", str(folder), "Once", "-n", "1", "--device", "cpu", "--tokenizer", "demo"]
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        sys.argv = before
    assert end.value.code == 2


def _refused(call: Callable[[str], Any]) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        with pytest.raises(MoestroError) as error:
            call(str(folder))
        assert "\n" not in str(error.value)

    return check


def _plainly(folder: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  # Transformers' own, of any kind
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=MoestroConfig(device="cpu"))


@pytest.mark.parametrize("write", [_bare, _among_tensors, _in_the_old_form])
@pytest.mark.parametrize("place", [_single, _sharded, _by_the_index_of_others, _quantized])
@pytest.mark.parametrize(
    "way",
    [_refused(lambda folder: load(folder, **ON_CPU)), _refused(inspect_model), _run, _plainly],
    ids=["load", "inspect", "run", "from_pretrained"],
)
def test_code_in_a_pickle_is_not_run(way: Any, place: Any, write: Any, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    save_model("mixtral", folder)
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    place(folder, write, mark)
    way(folder)
    assert not mark.exists()


def test_the_payload_would_run(tmp_path: Path) -> None:
    """What the test above holds the loaders to: the same files, read without care."""
    for write in (_bare, _among_tensors, _in_the_old_form):
        mark = tmp_path / write.__name__
        write(tmp_path / "pytorch_model.bin", mark)
        if write is _bare:
            pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
        else:
            torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
        assert mark.exists()


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantized with FineGrainedFP8Config but"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quantized with Mxfp4Config but"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "quantized with AwqConfig but"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, "quantized with GPTQConfig but"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "quantized with CompressedTensorsConfig but",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "use moestro.load("),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_the_plain_line_refuses_quantized_checkpoints(method: str, tmp_path: Path) -> None:
    """By Transformers' line, or by ours where Transformers does not know the method and lets our code begin."""
    config, says = CONFIGS[method]
    save_model("mixtral", tmp_path)
    _quantize(tmp_path, config)
    with pytest.raises(ModelError if method == "modelopt" else ValueError, match=re.escape(says)):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MoestroConfig(device="cpu"))


def test_the_plain_line_refuses_gguf_files(tmp_path: Path) -> None:
    test_sources_gguf = pytest.importorskip("test_sources_gguf", reason="needs gguf")
    model, path = test_sources_gguf._build("mixtral"), tmp_path / "m.gguf"
    test_sources_gguf.write_gguf(path, model, "llama", "Q8_0", test_sources_gguf.by_package("Q8_0"))
    with pytest.raises(ValueError, match="cannot combine Quantization and loading a model from a GGUF file"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, quantization_config=MoestroConfig())
