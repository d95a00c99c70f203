"""What a checkpoint's quantization_config says of its weights, and which methods are refused with what instead.

The tensors themselves show which modules are quantized, since ignore lists leave plain weights in the file; the
config gives what they do not show (bits, the meaning of stored zeros) and must agree with them otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError
from ..planning.options import METHOD
from ..planning.spelling import spelled

_READ = ("fp8", "mxfp8", "mxfp4", "compressed-tensors", "awq", "gptq", "modelopt", "modelopt_fp4", "nvfp4")
_REFUSED = {
    "bitsandbytes": "bitsandbytes (nf4, fp4 and int8)",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "aqlm": "AQLM",
    "quip": "QuIP#",
    "hqq": "HQQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "bitnet": "BitNet",
    "quanto": "Quanto",
    "torchao": "torchao",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp_quant": "FP-Quant",
    "quark": "Quark",
    "sinq": "SINQ",
}


@dataclass(frozen=True)
class Quantization:
    """The method that a checkpoint's weights were quantized by, and its own config.

    method: as in `quant_method`; "" where no weight is quantized.
    """

    method: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def taken_off(cls, model: str, config: Any) -> Quantization:
        """Take it off a checkpoint's Transformers config, whose text part may have it instead.

        Raises:
            ModelError: Moestro does not read weights of that method.
        """
        found = None
        for part in (config, config.get_text_config()):
            if (own := getattr(part, "quantization_config", None)) is not None:
                found = own
                del part.quantization_config
        if found is None:
            return cls()
        return cls.stated(model, dict(found) if isinstance(found, Mapping) else found.to_dict())

    @classmethod
    def stated(cls, model: str, own: Mapping[str, Any]) -> Quantization:
        """From what a config.json says of it.

        Raises:
            ModelError: Moestro does not read weights of that method.
        """
        method = str(getattr(own.get("quant_method"), "value", own.get("quant_method") or "")).lower()
        if method == METHOD:  # how a model of ours was run; its weights are as they always were
            return cls()
        if method in ("auto-round", "intel/auto-round", "auto_round"):
            method = next(
                (one for one in ("gptq", "awq") if one in str(own.get("packing_format", "auto_gptq"))), method
            )
        if not method and "quant_algo" in own:
            method = "modelopt"
        if method not in _READ:
            name = next((title for key, title in _REFUSED.items() if key in method), repr(method))
            raise ModelError(f"{model} is quantized by {name}, which Moestro does not read; {_instead()}")
        quantization = cls(method, own)
        quantization._check(model)
        return quantization

    def bits_of(self, name: str) -> int:
        """Bits of a weight of the module `name`, where the stored words do not show them.

        Raises:
            ModelError: no part of the config is about that module.
        """
        if self.method != "compressed-tensors":
            found = self.config["bits"] if "bits" in self.config else self.config.get("w_bit", 4)
            return found if isinstance(found, int) else 0
        weights = self._group_of(name).get("weights")
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if bits not in (4, 8):
            raise ModelError(f"{name} has weights of {bits} bits in 32-bit words; Moestro reads 4 and 8; {_instead()}")
        return int(bits)

    @property
    def zeros_less_one(self) -> bool:
        """Whether GPTQ's stored zeros are one less than they stand for (its first format)."""
        return bool(self.config.get("checkpoint_format", "gptq") != "gptq_v2")

    def _group_of(self, name: str) -> Mapping[str, Any]:
        groups = list(self.config.get("config_groups", {}).values())  # checked when they were taken off
        for group in groups:
            for target in group.get("targets", ()):
                is_pattern = target.startswith("re:")
                if re.match(target[3:], name) if is_pattern else target == name:
                    return group  # type: ignore[no-any-return]
        for group in groups:  # a class of modules, mostly "Linear"
            if any(not target.startswith("re:") and "." not in target for target in group.get("targets", ())):
                return group  # type: ignore[no-any-return]
        raise ModelError(f"{name} is quantized, but no group of the checkpoint's quantization_config names it")

    def _check(self, model: str) -> None:
        """Refuse what a config says that no reader here follows.

        Raises:
            ModelError: naming it.
        """
        block = self.config.get("weight_block_size")
        if self.method == "fp8" and block not in (None, [128, 128], (128, 128), [1, 32], (1, 32)):
            raise ModelError(f"{model} has FP8 scales for blocks of {block}; Moestro reads [128, 128] and [1, 32]")
        groups = self.config.get("config_groups", {})
        if not isinstance(groups, Mapping) or not all(_is_group(group) for group in groups.values()):
            raise ModelError(
                f"{model}: the config_groups of its quantization_config are no groups of targets and weights"
            )
        if self.method in ("awq", "gptq") and (bits := self.bits_of("")) not in (
            (4,) if self.method == "awq" else (4, 8)
        ):
            raise ModelError(
                f"{model} has {bits}-bit {self.method.upper()} weights, which Moestro does not read; {_instead()}"
            )
        version = str(self.config.get("version", "gemm")).lower()
        if self.method == "awq" and version != "gemm":
            raise ModelError(f"{model} has AWQ weights in the order {version!r}; Moestro reads 'gemm'; {_instead()}")


def _is_group(group: Any) -> bool:
    """Whether it is as compressed-tensors writes one: names of modules, and what their weights are."""
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping | None):
        return False
    targets = group.get("targets", ())
    return isinstance(targets, list | tuple) and all(isinstance(target, str) for target in targets)


def _instead() -> str:
    of_fewer = f"{spelled('bits')} 8, 4, 3 or 2"
    return f"use the model's unquantized checkpoint with {of_fewer}, or one in FP8, MXFP4, AWQ, GPTQ or GGUF"
