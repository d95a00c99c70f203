"""Files that llama.cpp quantized: logits and tokens are those that llama.cpp computes of the same weights.

tests/data/README.md says how the files were made. Nothing that made or evaluated them is shared with Moestro.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro import MoestroError, load, load_tokenizer
from moestro.loading.contents import inspect_model

pytest.importorskip("gguf")

FOLDER = Path(__file__).parent / "data" / "llama"
FILES = sorted(path.stem for path in FOLDER.glob("*.gguf"))
ARCHITECTURES = 10  # of the files; phimoe has none, deepseek2 two
SMALL_DEVICE: dict[str, Any] = {"device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "expected.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _compare(expected: dict[str, torch.Tensor], name: str, **options: Any) -> None:
    model = load(str(FOLDER / f"{name}.gguf"), dtype="float32", threads=2, **options)
    tokens, wanted, appended = (expected[f"{name}.{kind}"] for kind in ("tokens", "logits", "appended"))
    ids = tokens.long()[None]
    with torch.no_grad():
        found = model(ids).logits[0].float()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= 1e-3, f"{name}: logits differ by {error:.1e} of the largest one"
    greedy = {"do_sample": False, "max_new_tokens": len(appended), "eos_token_id": None, "pad_token_id": 0}
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0]
    assert text[ids.shape[1] :].tolist() == appended.tolist()


def test_all_files_are_there(expected: dict[str, torch.Tensor]) -> None:
    assert len(FILES) == ARCHITECTURES
    assert {name.rpartition(".")[0] for name in expected} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_logits_and_tokens_are_llama_cpps(name: str, expected: dict[str, torch.Tensor]) -> None:
    _compare(expected, name, device="cpu")


@pytest.mark.parametrize("name", ["deepseek3-iq4_xs", "gpt-oss-mxfp4", "mixtral-q5_k_m"])
def test_with_experts_in_slots(name: str, expected: dict[str, torch.Tensor]) -> None:
    _compare(expected, name, **SMALL_DEVICE)


@pytest.mark.parametrize("name", FILES)
def test_inspect_says_what_a_run_meets(name: str) -> None:
    """These files hold no tokenizer, though they name its kind; and their experts' bytes are what loading packs."""
    path = str(FOLDER / f"{name}.gguf")
    found = inspect_model(path)
    assert not found.tokenizer
    with pytest.raises(MoestroError, match="has no tokenizer"):
        load_tokenizer(path)
    model = load(path, device="cpu", threads=1)
    kinds = {fmt.name for math in model.moestro.math for fmt in math.format.matrices.values()}
    named = {kind.lower().replace("f32", "fp32").replace("f16", "fp16") for kind in found.parts["experts"].formats}
    assert kinds <= named
