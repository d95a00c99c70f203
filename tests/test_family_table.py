"""The table of families (planning/families.json) is what Transformers' classes of configs say.

`pytest tests/test_family_table.py --update-docs` writes it. What only models show is compared in test_families.py.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import FAMILIES, INSTALLED, TABLE_OF, Family, build_config
from family_table import OF_MODELS, as_text, config_table, make_table
from moestro.errors import ModelError
from moestro.planning import model_config
from moestro.planning.model_config import completed, experts_of, families, text_of
from moestro.planning.shapes import SHAPES
from moestro.planning.text_shape import text_shape

PATH = Path(model_config.__file__).with_name("families.json")


def test_the_table_is_of_this_transformers(request: pytest.FixtureRequest) -> None:
    if INSTALLED != TABLE_OF:
        pytest.skip("the table is of the Transformers that constraints.txt pins")
    if request.config.getoption("--update-docs"):
        PATH.write_text(as_text(make_table()))
        families.cache_clear()
    of_configs = {
        name: {key: value for key, value in entry.items() if key not in OF_MODELS} for name, entry in families().items()
    }
    made = json.loads(json.dumps(config_table()))
    assert of_configs == made, "planning/families.json is old: run pytest tests/test_family_table.py --update-docs"


def _same_numbers(config: Any, said: dict[str, Any]) -> None:
    """Our reader's numbers of what a config.json says are those of Transformers' own config."""
    theirs, ours = text_shape(config.to_dict(), 2), text_shape(completed(said), 2)
    for one in fields(theirs):
        assert getattr(ours, one.name) == getattr(theirs, one.name), one.name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_config_json_means_the_same_without_transformers(family: Family) -> None:
    kind = CONFIG_MAPPING[family.model_type or family.name]
    for config in (kind(), build_config(family)):
        _same_numbers(config, json.loads(config.to_json_string(use_diff=True)))


# Their classes work out more from a config that lists no kinds of layers: widths of single layers. Their published
# configs list them.
LISTED = ("dots3_note_text", "gemma4_text", "granitemoehybrid", "inkling_text")


BY_DEPTH = [
    kind
    for family in FAMILIES
    if not (kind := CONFIG_MAPPING[family.model_type or family.name]).sub_configs
    and kind.model_type not in LISTED
    and "layers" in families()[kind.model_type]
]


@pytest.mark.parametrize("depth", [5, 12, 23])
@pytest.mark.parametrize("kind", BY_DEPTH, ids=lambda kind: kind.model_type)
def test_kinds_of_layers_follow_from_the_depth(kind: Any, depth: int) -> None:
    """As in the config.json of an older checkpoint, which does not list them."""
    config = kind(num_hidden_layers=depth)
    _same_numbers(config, {"model_type": kind.model_type, "num_hidden_layers": depth})


def test_a_field_that_says_the_cycle_is_followed() -> None:
    found = completed({"model_type": "qwen3_next", "num_hidden_layers": 6, "full_attention_interval": 3})
    assert found["layer_types"] == ["linear_attention", "linear_attention", "full_attention"] * 2
    mixed = completed({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*-"})
    assert mixed["layers_block_type"] == ["linear_attention", "moe", "full_attention", "mlp"]


def test_unknown_families_are_refused_in_a_line() -> None:
    with pytest.raises(ModelError, match="of the family llama, which Moestro does not run"):
        completed({"model_type": "llama"}, "org/dense")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_say_their_experts(name: str) -> None:
    experts, chosen = experts_of(text_of(completed(SHAPES[name])))
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    assert experts == next(SHAPES[name][one] for one in names if one in SHAPES[name])
    assert chosen == SHAPES[name]["num_experts_per_tok"]
