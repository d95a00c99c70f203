"""Makes the table of families (planning/families.json) from Transformers' own classes."""

from __future__ import annotations

import ast
import inspect
import json
import re
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import FAMILIES, Family, build_config
from moestro.engine.chunks import REREAD
from moestro.planning import model_config, text_shape

# Fields that say after how many layers the other kind of layer comes.
BY = (
    *("full_attention_interval", "sliding_window_pattern", "global_attn_every_n_layers", "layer_group_size"),
    *("attn_layer_period", "hybrid_layer_interval", "global_attention_interval", "window_pattern"),
)
MORE = {"tie_word_embeddings", "model_type", "head_dim", "layer_types", "layers_block_type", *BY}
MORE |= {"max_source_positions", "d_model", "first_k_dense_replace", "num_nextn_predict_layers", "mlp_layer_types"}
DEPTH = 41


def _literals(module: Any) -> set[str]:
    tree = ast.parse(inspect.getsource(module))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def wanted_names() -> frozenset[str]:
    """The fields that planning reads."""
    return frozenset(_literals(text_shape) | _literals(model_config) | MORE)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) < 8 and all(isinstance(one, int | str) for one in value)
    return isinstance(value, bool | int | float | str)


def _parts(kind: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    found = {}
    for name, part in kind.sub_configs.items():
        found[name] = type(getattr(kind(), name)) if part is AutoConfig else part
    return found


def _kinds(config: PreTrainedConfig) -> list[str] | None:
    values = config.to_dict()
    found = values.get("layer_types") or values.get("layers_block_type")
    return None if found is None else list(found)


def _rule(kind: type[PreTrainedConfig]) -> dict[str, Any] | None:
    """How the kinds of layers follow from their number, where a config does not list them."""
    known = inspect.signature(kind.__init__).parameters
    if "num_hidden_layers" not in known:
        return None
    try:
        kinds = _kinds(kind(num_hidden_layers=DEPTH))
    except Exception:  # a family may refuse depths other than its own
        return None
    if kinds is None or len(kinds) != DEPTH:
        return None
    rule = _cycle(kinds)
    if rule is None:
        return None
    for name in BY:
        try:
            other = _cycle(_kinds(kind(num_hidden_layers=DEPTH, **{name: 3})) or [])
        except Exception:  # not a field of this family
            continue
        if other is not None and len(other["cycle"]) == 3 != len(rule["cycle"]):
            rule["by"] = name
    return rule


def _cycle(kinds: list[str]) -> dict[str, Any] | None:
    for skipped in range(4):
        body = kinds[skipped:]
        for length in range(1, 13):
            for cut in (0, 1):
                part = body[: len(body) - cut]
                if all(part[i] == part[i % length] for i in range(len(part))) and len(part) > 2 * length:
                    rule: dict[str, Any] = {"cycle": part[:length]}
                    if skipped:
                        rule["first"] = kinds[:skipped]
                    if cut:
                        rule["last"] = body[-1]
                    return rule
    return None


def _derived(kind: type[PreTrainedConfig], names: frozenset[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """What the class works out from nothing that a config says: the same for other sizes."""
    made = kind()
    sizes = {
        name: value * 2
        for name, value in (("num_hidden_layers", 6), ("hidden_size", getattr(made, "hidden_size", 0)))
        if name in inspect.signature(kind.__init__).parameters and value
    }
    try:
        one, other = made.to_dict(), kind(**sizes).to_dict()
    except Exception:  # a family may refuse other sizes
        return {}
    taken = {
        *kind.attribute_map,
        "model_type",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "per_layer_config",
    }
    return {
        name: one[name]
        for name in sorted(names - taken - defaults.keys())
        if one.get(name) is not None
        and one[name] == other.get(name)
        and (_is_plain(one[name]) or name == "compress_rates")
        and name not in ("num_key_value_heads", "head_dim", "quantization_config")
    }


def _entry(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    names = wanted_names()
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {
        name: list(one.default) if isinstance(one.default, tuple) else one.default
        for name, one in sorted(parameters.items())
        if name in names - {"model_type", *kind.attribute_map} and _is_plain(one.default)
    }
    entry: dict[str, Any] = {"defaults": defaults | _derived(kind, names, defaults)}
    renamed = dict(sorted(kind.attribute_map.items()))
    if renamed:
        entry["names"] = renamed
    if parts := _parts(kind):
        entry["parts"] = {name: part.model_type for name, part in sorted(parts.items())}
    if (rule := _rule(kind)) is not None:
        entry["layers"] = rule
    if "layers_block_type" in parameters:
        entry["blocks"] = True
    return entry


def of_model(name: str, model: Any) -> dict[str, Any]:
    """What only a model shows: names of its files' tensors that it has no place for, its embedding, its cache."""
    found: dict[str, Any] = {}
    patterns = sorted({*(model._keys_to_ignore_on_load_unexpected or ())})
    unused = [one for one in patterns if not any(re.search(one, key) for key in model.state_dict())]
    if unused:
        found["unused"] = unused
    if getattr(model.config, "tie_word_embeddings", False) and not model.all_tied_weights_keys:
        found["never_ties"] = True
    if type(model.get_input_embeddings()) is not nn.Embedding:
        found["embedding_in_torch"] = True
    if name in REREAD or not model._supports_default_dynamic_cache():
        found["reads_whole"] = True
    return found


def _on_meta(family: Family) -> Any:
    with torch.device("meta"):
        return getattr(transformers, family.auto).from_config(build_config(family), dtype=torch.float32)


def config_table() -> dict[str, dict[str, Any]]:
    """What the classes of configs show."""
    table: dict[str, dict[str, Any]] = {}

    def add(kind: type[PreTrainedConfig]) -> None:
        if kind.model_type in table:
            return
        table[kind.model_type] = _entry(kind)
        for part in _parts(kind).values():
            add(part)

    for family in FAMILIES:
        add(CONFIG_MAPPING[family.model_type or family.name])
    return table


OF_MODELS = ("unused", "never_ties", "embedding_in_torch", "reads_whole")


def make_table() -> dict[str, dict[str, Any]]:
    """The whole table."""
    table = config_table()
    for family in FAMILIES:
        table[family.model_type or family.name] |= of_model(family.name, _on_meta(family))
    return {name: table[name] for name in sorted(table)}


def as_text(table: dict[str, dict[str, Any]]) -> str:
    """As the file is written: a family a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in table.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"
