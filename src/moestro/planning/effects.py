"""Options that change nothing where they are given, each with the reason: none is silently left aside.

    >>> without_effect(Options(policy="lru"), ModelOptions(), Setting("plain", has_gpu=False))
    ["policy='lru' changes nothing here: without a GPU the CPU runs all experts"]

An option that is as it is by default says nothing. What contradicts the model or the device is refused elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from .option import Checked, about, name_of
from .options import FITTED_BITS, ModelOptions, Options
from .policies import policy_name
from .spelling import spelled

Kind = Literal["shape", "plain", "stored", "packed"]
_OF_HUB = ("revision", "token", "cache_dir", "local_files_only")
_OF_KIND = {"stored": "a checkpoint that is quantized already", "packed": "a packed folder"}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where options are given.

    kind: of the model: random weights of a shape, a checkpoint without quantization, one that is quantized or a GGUF
    file, or a packed folder. has_gpu: a real or pretended one. is_here: the model is no name on the hub.
    """

    kind: Kind
    has_gpu: bool
    is_here: bool = True


def without_effect(options: Options, source: ModelOptions, setting: Setting) -> list[str]:
    """A line for each option that was given and changes nothing."""
    reasons = _of_device(options, setting) | _of_weights(options, setting) | _of_source(setting)
    return [
        f"{_as_given(given, name)} changes nothing here: {reasons[name]}"
        for given in (options, source)
        for name in _given(given)
        if name in reasons
    ]


def _of_device(options: Options, setting: Setting) -> dict[str, str]:
    if setting.has_gpu:
        return {} if options.pack_dense else {"pack_dense": "dense layers are on the GPU, which has them unpacked"}
    found = {
        "machine": "without a GPU nothing is planned by speeds",
        "profile": "without a GPU all experts are in RAM",
    }
    if options.sequences is None:
        found["context"] = "it plans GPU memory, and there is no GPU; the model's own context holds"
    if policy_name(options.policy) != "cpu-only":  # which is what happens
        found["policy"] = "without a GPU the CPU runs all experts"
    return found


def _of_weights(options: Options, setting: Setting) -> dict[str, str]:
    kept = _OF_KIND.get(setting.kind)
    bits = (options.bits, options.expert_bits, options.dense_bits, options.head_bits)
    found = {}
    if kept is not None:
        found["fit"] = f"the weights of {kept} are not fitted again"
        found["cache"] = f"{kept} is not kept in the cache"
    elif not {*bits} & {*FITTED_BITS}:
        found["fit"] = f"only 4, 3 and 2 bits are fitted; give {spelled('bits')}"
    if setting.kind == "shape":
        found |= {"fit": "random weights are not fitted", "cache": "random weights are not kept"}
    elif kept is None and all(one in (None, 16) for one in bits):
        found["cache"] = f"only quantized weights are kept; give {spelled('bits')}"
    return found


def _of_source(setting: Setting) -> dict[str, str]:
    if setting.kind != "shape":
        found = {"seed": "a checkpoint has its weights; only text and random shapes are drawn"}
        return found | dict.fromkeys(_OF_HUB, "the model is here, not on the hub") if setting.is_here else found
    return dict.fromkeys((*_OF_HUB, "config", "tokenizer", "trust_remote_code"), "a random shape has no files")


def _given(options: Checked) -> list[str]:
    return [one.name for one in fields(options) if getattr(options, one.name) != one.default]


def _as_given(options: Checked, name: str) -> str:
    value: Any = getattr(options, name)
    value = policy_name(value) if name == "policy" else value
    one = next(field for field in fields(options) if field.name == name)
    return spelled(name_of(one)) if about(one).is_secret else spelled(name_of(one), value)
