"""Every family with experts and linear layers in FP8, and the table of all forms that the tests try.

The table stands in docs/models.md; `pytest tests/test_families_stored.py --update-docs` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import FAMILIES, Family, build_model, random_ids
from moestro import load
from moestro.compute.cpu import levels
from moestro.decode.dense import Packed
from moestro.engine.families import expert_modules
from moestro.engine.gates import find_router
from survey_checks import same_bytes
from test_families import DOC, FORMS, needs_its_own_version
from test_sources_gguf import KNOWN, TYPES
from test_sources_safetensors import CASES, KINDS
from test_stored import GGUF_FAMILIES

# What vendors and quantizers are known to publish (November 2026); none of these files was tried.
PUBLISHED = {
    "deepseek_v2": "bf16; GGUF",
    "deepseek_v3": "FP8 alone (V3, R1, V3.1, Kimi K2); GGUF",
    "deepseek_v32": "FP8 alone",
    "deepseek_v4": "experts in MXFP4, the rest in FP8, alone; GGUF",
    "glm4_moe": "bf16, FP8; NVFP4, GGUF",
    "glm_moe_dsa": "bf16, FP8",
    "gpt_oss": "experts in MXFP4, alone; GGUF",
    "granitemoe": "bf16; GGUF",
    "kimi_k25": "experts in compressed-tensors INT4, alone; GGUF",
    "minimax_m2": "FP8 alone; NVFP4, GGUF",
    "minimax_m3_vl": "MXFP8; compressed-tensors MXFP4",
    "mixtral": "bf16; AWQ, GPTQ, GGUF",
    "olmoe": "bf16; GGUF",
    "phimoe": "bf16; GGUF",
    "qwen2_moe": "bf16, GPTQ; GGUF",
    "qwen3_5_moe": "bf16, FP8; NVFP4, GPTQ, compressed-tensors INT4, GGUF",
    "qwen3_moe": "bf16, FP8, GPTQ, GGUF; AWQ",
    "qwen3_next": "bf16, FP8; GGUF",
    "qwen4_exp": "bf16, FP8; NVFP4, GGUF",
}
# Their stacked experts have input features in rows, for which there is no known form in FP8.
TRANSPOSED = ("aria", "aria_text", "gpt_oss")
# Where fp8 is not what a family's routers, tables and small layers are published in.
PLAIN = ("lm_head", "embed", "norm", "router", "conv", "vision", "visual", "audio", "tower", "patch", "indexer")
END = "<!-- end of forms -->\n"


def _saved(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _in_fp8(folder: Path, family: Family) -> nn.Module:
    """Save a tiny model, quantize its experts and linear layers, and load what they stand for back."""
    model = build_model(family)
    model.save_pretrained(folder)
    write, config = KINDS["fp8"]()
    tensors, values = _saved(folder), dict[str, Tensor]()
    shapes = {tuple(p.shape) for each in expert_modules(model).values() for p in each.parameters() if p.dim() == 3}
    transposed = any(each.is_transposed for each in expert_modules(model).values())
    for name, tensor in list(tensors.items()):
        if any(word in name.lower() for word in PLAIN) or name.endswith("gate.weight") or min(tensor.shape) <= 4:
            continue
        if tensor.dim() == 2 and name.endswith(".weight") and min(tensor.shape) > 8:
            parts, values[name] = write(tensors.pop(name))
            tensors |= {name.removesuffix("weight") + ending: part for ending, part in parts.items()}
        elif tuple(tensor.shape) in shapes and not transposed:  # experts that are stacked
            written = [write(matrix) for matrix in tensors.pop(name)]
            values[name] = torch.stack([value for _, value in written])
            stem = name.removesuffix(".weight")
            for ending, after in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
                stacked = torch.stack([parts[ending] for parts, _ in written])
                tensors[f"{name.removesuffix('weight')}{ending}" if stem != name else f"{name}{after}"] = stacked
    _write(folder, tensors, config)
    model.save_pretrained(folder / "reference")
    _write(folder / "reference", _saved(folder / "reference") | values, None)
    return type(model).from_pretrained(folder / "reference", dtype=torch.float32)


def _write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> None:
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if quantization is not None:
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stored | {"quantization_config": quantization}))


@pytest.mark.sample(20)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_each_family_in_fp8(family: Family, tmp_path: Path) -> None:
    """Logits are Transformers' with the dequantized weights; experts and linear layers are kept in FP8."""
    expected = _in_fp8(tmp_path, family)
    found: Any = load(str(tmp_path), dtype="float32", device="cpu", threads=1)
    same_bytes(tmp_path, found)
    ids = random_ids()
    wanted = expected(ids).logits.float()
    assert float((found(ids).logits.float() - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())
    formats = {fmt.name for math in found.moestro.math for fmt in math.format.matrices.values()}
    modules = expert_modules(found)
    assert ("fp8" in formats) is (family.name not in TRANSPOSED)
    routers = {id(find_router(found, name)) for name in modules}
    if levels():
        linears = [m for m in found.modules() if isinstance(m, Packed) and id(m) not in routers]
        assert any(module.matrix.fmt.name == "fp8" for module in linears)


def _table() -> str:
    kinds = {family.name: {"fp8 but for experts" if family.name in TRANSPOSED else "fp8"} for family in FAMILIES}
    for family, kind in CASES:
        kinds[family].add(kind)
    kinds["gpt_oss"].add("mxfp4")
    kinds["deepseek_v4"] |= {"fp4", "fp8-ue8m0"}
    files = {name.partition(" ")[0] for name in KNOWN}
    rows = []
    for name in sorted(kinds):
        gguf = ", ".join(TYPES) if name in GGUF_FAMILIES else "F32, read only" if name in files else ""
        rows.append(f"| {name} | {', '.join(sorted(kinds[name]))} | {gguf} | {PUBLISHED.get(name, '')} |")
    return "\n".join(rows)


def _section() -> str:
    return f"""{FORMS}
## Quantized checkpoints

Each form in which the tests make a tiny model of a family, load it and compare logits with Transformers' over the
dequantized weights (within 1e-3; `tests/test_families_stored.py`, `tests/test_stored.py`). Experts and linear layers
are kept at their own bits. Forms in safetensors: `int4g32`, `int8-channel` and the like, `fp8-channel`, `nvfp4` and
`mxfp4` are written by compressed-tensors' own packer; `fp8` has scales for 128 x 128 weights, in float32, bfloat16 or
powers of two; `modelopt` is NVIDIA's NVFP4; the others are named after what writes them. The last column is what is
known to be published, the vendor's own before the semicolon; none of those files was tried.

| family | safetensors | GGUF | published as |
| --- | --- | --- | --- |
{_table()}

{END}"""


@needs_its_own_version
def test_the_table_of_forms_is_what_the_tests_try(request: pytest.FixtureRequest) -> None:
    text = DOC.read_text()
    before, _, rest = text.partition(FORMS)
    after = rest.partition(END)[2]
    if request.config.getoption("--update-docs"):
        DOC.write_text(before.rstrip("\n") + "\n\n" + _section() + after)
    assert _section() in DOC.read_text(), (
        "docs/models.md is old: run pytest tests/test_families_stored.py --update-docs"
    )
    assert PUBLISHED.keys() <= {family.name for family in FAMILIES}
