"""What a config.json says of a model once its family's defaults are filled in, without Transformers.

    >>> completed({"model_type": "mixtral", "num_hidden_layers": 2})["num_local_experts"]
    8

`families.json` has each family's defaults, other names and kinds of layers; `tests/test_family_table.py` makes it from
Transformers' own classes, and fails where it is stale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ModelError

TEXT_PARTS = ("text_config", "thinker_config", "language_config", "llm_config")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "experts_per_token")
# Letters of a pattern of layers, as Nemotron-H's config.json spells it.
_LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


@cache
def families() -> dict[str, dict[str, Any]]:
    """What is known of each family, by its `model_type`."""
    table: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("families.json").read_bytes())
    return table


def completed(config: Mapping[str, Any], model: str = "this model") -> dict[str, Any]:
    """A config.json with what it leaves out, in its own words; parts of it too.

    Raises:
        ModelError: Moestro runs no model of its family.
    """
    kind = str(config.get("model_type"))
    if kind not in families():
        raise ModelError(
            f"{model} is of the family {kind}, which Moestro does not run; docs/models.md lists the others"
        )
    return _completed(config, families()[kind])


def _completed(config: Mapping[str, Any], family: Mapping[str, Any]) -> dict[str, Any]:
    names: Mapping[str, str] = family.get("names", {})
    given = {names.get(name, name): value for name, value in config.items()}
    values = {**family["defaults"], **given}
    for name, kind in family.get("parts", {}).items():
        part = values.get(name)
        part = part if isinstance(part, Mapping) else {}
        inner = families().get(str(part.get("model_type", kind))) or families()[kind]
        values[name] = _completed(part, inner)
    if values.get("layer_types") is None and values.get("layers_block_type") is None:
        kinds = _kinds_of_layers(values, given, family)
        if kinds is not None:
            values["layers_block_type" if family.get("blocks") else "layer_types"] = kinds
    return values


def _kinds_of_layers(
    values: Mapping[str, Any], given: Mapping[str, Any], family: Mapping[str, Any]
) -> list[str] | None:
    """Of each layer, where the config does not list them: a cycle, whose length a field may say, and a last one."""
    if isinstance(pattern := given.get("hybrid_override_pattern"), str):
        return [_LETTERS.get(letter, "mlp") for letter in pattern]
    if (rule := family.get("layers")) is None:
        return None
    count, cycle = values.get("num_hidden_layers") or 0, list(rule["cycle"])
    length = given.get(rule["by"]) if "by" in rule else None
    if isinstance(length, int) and length > 0:
        cycle = [cycle[0]] * (length - 1) + [cycle[-1]]
    first = list(rule.get("first", ()))
    kinds = [*first, *(cycle[i % len(cycle)] for i in range(max(0, count - len(first))))][:count]
    return [*kinds[:-1], rule["last"]] if kinds and "last" in rule else kinds


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a completed config that is about text, with what stands around it of dtype and tied weights."""
    inner = next((config[name] for name in TEXT_PARTS if isinstance(config.get(name), Mapping)), None)
    if inner is None:
        return config
    names = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
    outer = {name: config[name] for name in names if config.get(name) is not None}
    return text_of({**outer, **{name: value for name, value in inner.items() if value is not None}})


def experts_of(text: Mapping[str, Any]) -> tuple[int, int]:
    """How many experts a layer has, and how many each token is sent to; 0 where a config does not say."""

    def number(names: tuple[str, ...]) -> int:
        found = (text.get(name) for name in names)
        return next((_largest(value) for value in found if _largest(value)), 0)

    return number(_EXPERTS), number(_CHOSEN)


def _largest(value: Any) -> int:
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
