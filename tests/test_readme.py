"""The README's table of what models need is what the planner says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moestro.loading.outlook import Place, choose, place_of
from moestro.loading.survey import survey
from moestro.planning.options import ModelOptions, Options

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- RAM by bits: pytest tests/test_readme.py --update-docs -->\n", "<!-- end -->"
MODELS = {
    "allenai/OLMoE-1B-7B-0924-Instruct": "olmoe-1b-7b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
    "zai-org/GLM-4.5-Air": "glm-4.5-air",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
}
BITS = (16, 8, 4, 3, 2)


def _ram_gib(shape: str, bits: int, place: Place) -> float:
    found = survey(None, ModelOptions(shape=shape))
    return choose(found, Options(bits=bits, device="cpu", context=4096), place).ram_bytes / 2**30


def _table() -> str:
    place = replace(place_of(Options(device="cpu", machine="rtx4090")), free_ram_bytes=2**41)
    lines = ["| GiB of RAM | " + " | ".join(f"`--bits {bits}`" for bits in BITS) + " |", "| --- " * 6 + "|"]
    for name, shape in MODELS.items():
        lines.append(f"| {name} | " + " | ".join(f"{_ram_gib(shape, bits, place):.1f}" for bits in BITS) + " |")
    return "\n".join(lines) + "\n"


def test_the_table_is_what_the_planner_says(request: pytest.FixtureRequest) -> None:
    before, rest = README.read_text().split(BEGIN)
    kept, after = rest.split(END)
    if request.config.getoption("--update-docs"):
        README.write_text(before + BEGIN + _table() + END + after)
    else:
        assert kept == _table()
