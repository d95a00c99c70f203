"""`--transcode 8`: types of GGUF that no format keeps become int8, by the gguf package's own rules and ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from moestro import MoestroError, load
from moestro.cli.main import app
from moestro.engine.families import expert_modules
from moestro.loading.contents import inspect_model
from moestro.loading.gguf_header import TRANSCODED
from moestro.loading.sources import gguf_types, open_source
from moestro.memory.formats.raw import RawMatrix
from moestro.planning.budget import format_bytes
from raw_reader import read_raw
from test_sources_gguf import _build, gguf, random_blocks, write_gguf
from test_sources_safetensors import FAMILY, write_checkpoint
from test_stored import DEVICES, _as_stored, _same


def write(path: Path, kind: Any, family: str = "mixtral") -> nn.Module:
    model = _build(family, hidden_size=256, intermediate_size=256, moe_intermediate_size=256)
    arch = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}[family]

    def quantize(name: str, weight: np.ndarray) -> Any:
        return random_blocks(kind if isinstance(kind, str) else kind(name))(name, weight)

    write_gguf(path, model, arch, kind, quantize)
    return model


def _near(found: RawMatrix, wanted: Tensor) -> None:
    """Within half a step of int8, whose largest of 64 columns is 127 steps, or 1e-3 of it where fp16 cuts the step."""
    assert found.fmt.name == "int8"
    groups = wanted.unflatten(1, (-1, 64))
    step = groups.abs().amax(-1, keepdim=True) / 127
    off = (read_raw(found).unflatten(1, (-1, 64)) - groups).abs()
    assert bool((off <= 0.5 * step + 127 * step * 2**-11 + 1e-7).all())
    assert float(off.max()) > 0 or float(step.max()) == 0


@pytest.mark.parametrize("kind", TRANSCODED)
def test_each_type_is_rounded_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix on its own; what is a float meanwhile is one expert's matrix, or some rows of a dense one."""
    path = tmp_path / "m.gguf"
    model = write(path, kind)
    stored = {one.name: one for one in gguf.GGUFReader(path).tensors}
    wanted = {name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()) for name, one in stored.items()}
    sizes = []
    floats_of = gguf_types.floats_of
    monkeypatch.setattr(gguf_types, "floats_of", lambda data, name: sizes.append(len(data)) or floats_of(data, name))
    monkeypatch.setattr(gguf_types, "_ROWS_AT_ONCE", 48)
    weights = open_source(str(path), transcode=8).weights(model)
    for name, module in expert_modules(model).items():
        for expert in range(module.num_experts):
            for part, one in weights.expert(name, expert).matrices.items():
                _near(one.raw, wanted[f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight"][expert])
    dense = {name: value for name, value in weights.dense() if not isinstance(value, Tensor)}
    _near(dense["model.embed_tokens.weight"].raw, wanted["token_embd.weight"])
    assert max(sizes) <= 48


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", DEVICES, ids=lambda options: options["device"])
def test_a_model_runs_and_its_new_size_is_said(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Down keeps its Q4_K; gate and up, and the dense layers, are rounded."""
    path = tmp_path / "m.gguf"
    model = write(path, lambda name: "Q4_K" if "ffn_down" in name else "IQ2_XXS", "qwen3_moe")
    with caplog.at_level(logging.WARNING, "moestro"):
        found = load(str(path), dtype="float32", threads=2, transcode=8, **options)
    assert {math.format.name for math in found.moestro.math} == {"int8+int8+q4_k"}
    said = [record.message for record in caplog.records if "become" in record.message]
    assert len(said) == 1
    assert said[0].startswith("IQ2_XXS: ")
    weights = sum(one.n_elements for one in gguf.GGUFReader(path).tensors if one.tensor_type.name == "IQ2_XXS")
    assert f"{format_bytes(weights // 256 * 66)} become {format_bytes(weights * 33 // 32)} in int8" in said[0]
    _same(found, _as_stored(path, model, transcode=8))


def test_without_the_option_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, "IQ3_S")
    with pytest.raises(
        MoestroError, match="is of type IQ3_S, which Moestro does not keep: transcode=8 rounds"
    ) as error:
        load(str(path), device="cpu")
    assert "\n" not in str(error.value)
    done = CliRunner().invoke(app, ["run", str(path), "Once", "--device", "cpu", "--tokenizer", "demo"])
    assert done.exit_code != 0
    assert inspect_model(str(path)).transcode == ("IQ3_S",)
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert "IQ3_S: loads with --transcode 8" in shown.output
    write(path, "Q4_K")
    assert not inspect_model(str(path)).transcode
    assert "transcode" not in CliRunner().invoke(app, ["inspect", str(path)]).output


def test_only_gguf_files_are_transcoded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FAMILY["mixtral"], "fp8")
    for model in ({"model": str(tmp_path)}, {"model": "demo"}, {"shape": "olmoe-1b-7b"}):
        with pytest.raises(MoestroError, match=r"transcode=8 is for GGUF files, and .* is none; leave it out"):
            load(**model, transcode=8, device="cpu")
