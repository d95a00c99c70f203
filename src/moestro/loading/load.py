"""From a name to a model that runs: a checkpoint's folder, a hub id, `demo`, or a random shape.

    model = moestro.load("mistralai/Mixtral-8x7B-Instruct-v0.1", gpu_memory="12GiB", ram="96GiB")
    model.generate(...)                   # Transformers' own model; model.moestro is its conductor

Turns what Transformers and safetensors raise about a bad checkpoint into one line each. Knows neither
placement nor policies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..engine.families import METHOD
from ..engine.forks import set_torch_threads
from ..errors import CheckpointError, ModelError, MoestroError, RequestError, first_line
from ..planning.policies import DEFAULT_POLICY
from .checkpoint import check_files, read_config, refuse_code, resolve, tensor_names, wrong_prefix
from .config import MoestroConfig
from .plug import MoestroQuantizer  # noqa: F401  # registers the quantizer and the experts function
from .random_model import build_random_model, shape_tokenizer

logger = logging.getLogger("moestro")

_DTYPES = {
    "auto": "auto",
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


def load(
    model: str | None = None,
    *,
    shape: str | None = None,
    gpu_memory: str | int | None = None,
    ram: str | int | None = None,
    context: int | None = None,
    policy: str = DEFAULT_POLICY,
    device: str = "auto",
    link: str | float | None = None,
    machine: str | None = None,
    clock: str = "wall",
    profile: str | None = None,
    dtype: str | torch.dtype = "auto",
    threads: int | None = None,
    bits: int | None = None,
    expert_bits: int | None = None,
    dense_bits: int | None = None,
    head_bits: int | None = None,
    fuse: bool = True,
    pack_dense: bool = True,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a Mixture-of-Experts model with its experts in Moestro's hands.

    Args:
        model: a folder, a hub id, or "demo", the small model that ships with the package.
        shape: instead of a model, a shape of `moestro.planning.shapes` with random weights from `seed`.
        gpu_memory, ram: the most memory to use, like "12GiB"; None for what is free.
        policy: who decides which expert runs where; see `moestro.planning.policies`.
        device: "auto", "cpu", "cuda" or "emulated" (a pretended GPU, for tests).
        context, link, machine, clock, profile, fuse, pack_dense: see `MoestroConfig`.
        dtype: "auto" (the checkpoint's own), "float32", "float16", "bfloat16", or torch's own.
        threads: of our kernels and of torch, for the whole process; None for one on each core, and torch's as is.
        bits: of the weights, 16, 8 or 4; None for the checkpoint's own dtype.
        expert_bits, dense_bits, head_bits: the same for experts, for dense layers, and for the output head with
            the embedding; None for `bits`. Below 16, dense layers and head need `device="cpu"`.
        trust_remote_code: run code that the checkpoint brings. Without it none is run and nothing asks.

    Returns:
        The Transformers model, in eval mode; its conductor is the attribute `moestro`.

    Raises:
        MoestroError: one line on what was found, what was needed and what to do.
    """
    config = MoestroConfig(
        gpu_memory=gpu_memory,
        ram=ram,
        context=context,
        policy=policy,
        device=device,
        link=link,
        machine=machine,
        clock=clock,
        profile=profile,
        threads=threads,
        bits=bits,
        expert_bits=expert_bits,
        dense_bits=dense_bits,
        head_bits=head_bits,
        fuse=fuse,
        pack_dense=pack_dense,
    )
    return _load(model, shape, config, _parse_dtype(dtype), seed, trust_remote_code)


def load_tokenizer(
    model: str | None = None, *, shape: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, or one that spells out ids for a random shape.

    Args:
        trust_remote_code: run code that the checkpoint brings for it. Without it none is run and nothing asks.

    Raises:
        CheckpointError: the checkpoint has none. ModelError: it needs code that is not trusted.
    """
    if shape is not None:
        return shape_tokenizer(shape)
    assert model is not None
    source = resolve(model)
    read_config(model, source, trust_remote_code)  # first, since a model that is not there has no tokenizer either
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise all kinds
        refuse_code(model, error)
        raise CheckpointError(
            f"{model} has no tokenizer that Transformers can read; put its tokenizer.json beside the weights "
            f"({first_line(error)})"
        ) from error


def _load(
    model: str | None, shape: str | None, config: MoestroConfig, dtype: Any, seed: int, trust_remote_code: bool
) -> PreTrainedModel:
    if (model is None) == (shape is None):
        raise RequestError("name one model: a folder, a hub id, demo, or a shape with random weights")
    if config.threads is not None:
        set_torch_threads(config.threads)
    if shape is not None:
        return build_random_model(shape, config, dtype=dtype, seed=seed)
    assert model is not None
    return _load_checkpoint(model, config, dtype, trust_remote_code)


def _parse_dtype(dtype: str | torch.dtype) -> Any:
    if dtype in _DTYPES.values():
        return dtype
    if dtype not in _DTYPES:
        raise RequestError(f"no dtype {dtype!r}; there are: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _load_checkpoint(model: str, quantization_config: MoestroConfig, dtype: Any, trust_remote_code: bool) -> Any:
    source = resolve(model)
    config = read_config(model, source, trust_remote_code)
    auto = _auto_class(config)
    if Path(source).is_dir():
        check_files(Path(source))
    with _loading_report() as report:
        try:
            loaded, info = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                quantization_config=quantization_config,
                experts_implementation=METHOD,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        except CheckpointError:
            _check_prefix(model, source, auto, config, trust_remote_code)
            raise
        except MoestroError:
            raise
        except Exception as error:  # whatever Transformers and its file formats make of a damaged checkpoint
            refuse_code(model, error)
            raise CheckpointError(_explain(model, report, error)) from error
    if missing := sorted(info["missing_keys"]):
        _check_prefix(model, source, auto, config, trust_remote_code)
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{model} has no {missing[0]}{more}; it is incomplete: download it again")
    if unused := sorted(info["unexpected_keys"]):
        logger.warning("%s has %d tensors that its config has no place for, such as %s", model, len(unused), unused[0])
    return loaded


def _auto_class(config: Any) -> Any:
    """The auto class of Transformers that finds, by `model_type`, what generates text from such a config.

    `architectures` decides only between the text model and the whole of a family that has both; a checkpoint's
    own code is asked for by the name that its `auto_map` uses.

    Raises:
        ModelError: there is none.
    """
    autos = {
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    own_code = getattr(config, "auto_map", None) or {}
    found = {}
    for auto, mapping in autos.items():
        classes = mapping.get(type(config), ())
        classes = classes if isinstance(classes, (list, tuple)) else (classes,)
        if any(each.can_generate() for each in classes) or auto.__name__ in own_code:
            found[auto] = {each.__name__ for each in classes}
    if not found:
        raise ModelError(f"Transformers has no class that generates text from a {config.model_type} checkpoint")
    named = config.architectures if isinstance(config.architectures, list) else []
    return next((auto for auto, names in found.items() if any(name in named for name in names)), next(iter(found)))


def _check_prefix(model: str, source: str, auto: Any, config: Any, trust_remote_code: bool) -> None:
    """Say so where a checkpoint has what was missed, under names that all begin otherwise.

    Raises:
        CheckpointError: it has.
    """
    with torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=trust_remote_code)
    of_model = empty.state_dict()
    of_checkpoint = revert_weight_conversion(empty, of_model)  # under the names that the family publishes
    prefixes = wrong_prefix(tensor_names(source), {**of_model, **of_checkpoint})
    if prefixes is not None:
        has, needs = (f"begin with {prefix!r}" if prefix else "have no prefix" for prefix in prefixes)
        raise CheckpointError(
            f"{model}: the names of its tensors {has}, but those of its model {needs}; rename them, or save the "
            "model's own state_dict again"
        )


@contextmanager
def _loading_report() -> Iterator[list[str]]:
    """Catch the table that Transformers logs about a load, instead of printing it."""
    report: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: report.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    propagate, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.INFO)  # at WARNING, Transformers also warns of parallel plans that nobody asked for
    logger.addHandler(handler)
    try:
        yield report
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _explain(model: str, report: list[str], error: Exception) -> str:
    """One line from a loading report of many, or from the error where there is none."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(report))
    broken = re.findall(r"^(\S.*?)\s*\|\s*(CONVERSION|MISMATCH)", text, re.MULTILINE)
    if not broken:
        return f"{model} cannot be loaded: {type(error).__name__}: {first_line(error)}"
    name, kind = broken[0]
    what = (
        "have shapes other than its config says" if kind == "MISMATCH" else "are not all there or do not fit together"
    )
    return f"{model}: the tensors for {name} {what}; download it again"
