"""From a name to a model that runs: a checkpoint's folder, a hub id, `demo`, or a random shape.

    model = moestro.load("mistralai/Mixtral-8x7B-Instruct-v0.1", gpu_memory="12GiB", ram="96GiB")
    model.generate(...)                   # Transformers' own model; model.moestro is its conductor

Turns what Transformers and safetensors raise about a bad checkpoint into one line each. Knows neither
placement nor policies.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from .config import METHOD, MoestroConfig
from .errors import CheckpointError, ModelError, MoestroError, RequestError
from .forks import set_torch_threads
from .planning.policies import DEFAULT_POLICY
from .plug import MoestroQuantizer  # noqa: F401  # registers the quantizer and the experts function
from .random_model import build_random_model, shape_tokenizer

logger = logging.getLogger("moestro")

DEMO = "demo"
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
    seed: int = 0,
) -> PreTrainedModel:
    """Load a Mixture-of-Experts model with its experts in Moestro's hands.

    Args:
        model: a folder, a hub id, or "demo", the small model that ships with the package.
        shape: instead of a model, a shape of `moestro.planning.shapes` with random weights from `seed`.
        gpu_memory, ram: the most memory to use, like "12GiB"; None for what is free.
        policy: who decides which expert runs where; see `moestro.planning.policies`.
        device: "auto", "cpu", "cuda" or "emulated" (a pretended GPU, for tests).
        context, link, machine, clock, profile, fuse: see `MoestroConfig`.
        dtype: "auto" (the checkpoint's own), "float32", "float16", "bfloat16", or torch's own.
        threads: of our kernels and of torch, for the whole process; None for one on each core, and torch's as is.
        bits: of the weights, 16, 8 or 4; None for the checkpoint's own dtype.
        expert_bits, dense_bits, head_bits: the same for experts, for dense layers, and for the output head with
            the embedding; None for `bits`. Below 16, dense layers and head need `device="cpu"`.

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
    )
    return _load(model, shape, config, _parse_dtype(dtype), seed)


def load_tokenizer(model: str | None = None, *, shape: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, or one that spells out ids for a random shape.

    Raises:
        CheckpointError: the checkpoint has none.
    """
    if shape is not None:
        return shape_tokenizer(shape)
    assert model is not None
    source = _resolve(model)
    _read_config(model, source)  # first, since a model that is not there has no tokenizer either
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raise all kinds
        raise CheckpointError(
            f"{model} has no tokenizer that Transformers can read; put its tokenizer.json beside the weights "
            f"({_first_line(error)})"
        ) from error


def _load(model: str | None, shape: str | None, config: MoestroConfig, dtype: Any, seed: int) -> PreTrainedModel:
    if (model is None) == (shape is None):
        raise RequestError("name one model: a folder, a hub id, demo, or a shape with random weights")
    if config.threads is not None:
        set_torch_threads(config.threads)
    if shape is not None:
        return build_random_model(shape, config, dtype=dtype, seed=seed)
    assert model is not None
    return _load_checkpoint(model, config, dtype)


def _parse_dtype(dtype: str | torch.dtype) -> Any:
    if dtype in _DTYPES.values():
        return dtype
    if dtype not in _DTYPES:
        raise RequestError(f"no dtype {dtype!r}; there are: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _resolve(model: str) -> str:
    """The folder or hub id that a model's name stands for."""
    if model == DEMO:
        return str(Path(__file__).parent / "demo")
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelError(f"{model} is a file; name the folder with its config.json")
    looks_like_path = model.startswith((".", "/", "~", "\\")) or model.count("/") > 1
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(f"no folder {model}; name a checkpoint's folder, a hub id like org/name, or demo")
    return model


def _load_checkpoint(model: str, quantization_config: MoestroConfig, dtype: Any) -> PreTrainedModel:
    source = _resolve(model)
    config = _read_config(model, source)
    if Path(source).is_dir():
        _check_files(Path(source))
    with _loading_report() as report:
        try:
            loaded, info = _model_class(config).from_pretrained(
                source,
                config=config,
                dtype=dtype,
                quantization_config=quantization_config,
                experts_implementation=METHOD,
                output_loading_info=True,
            )
        except MoestroError:
            raise
        except Exception as error:  # whatever Transformers and its file formats make of a damaged checkpoint
            raise CheckpointError(_explain(model, report, error)) from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{model} has no {missing[0]}{more}; it is incomplete: download it again")
    if unused := sorted(info["unexpected_keys"]):
        logger.warning("%s has %d tensors that its config has no place for, such as %s", model, len(unused), unused[0])
    return loaded


def _read_config(model: str, source: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # a config.json may hold anything
        if not Path(source).is_dir():
            raise ModelError(
                f"no model {model}: no folder of that name here, and the hub gave none ({_first_line(error)})"
            ) from error
        if not (Path(source) / "config.json").exists():
            raise ModelError(f"{model} has no config.json; name the folder of a Hugging Face checkpoint") from error
        raise ModelError(f"{model}: Transformers cannot use its config.json: {_first_line(error)}") from error
    text_config = config.get_text_config()
    own = getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    if own is not None:
        method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", own)
        raise ModelError(
            f"{model} is already quantized ({method}), which Moestro cannot read yet; use the unquantized checkpoint"
        )
    for part in (config, text_config):
        experts, top_k = (getattr(part, name, None) for name in ("num_local_experts", "num_experts_per_tok"))
        if isinstance(experts, int) and isinstance(top_k, int) and not 1 <= top_k <= max(experts, 1):
            raise ModelError(f"{model}: its config.json routes each token to {top_k} of {experts} experts")
    return config


def _model_class(config: Any) -> Any:
    """The class that generates text from such a config: the one that the checkpoint names, if it is known."""
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for candidate in (*named, *(mapping[type(config)] for mapping in mappings if type(config) in mapping)):
        if candidate is not None and candidate.can_generate():
            return candidate
    raise ModelError(f"Transformers has no class that generates text from a {config.model_type} checkpoint")


def _check_files(folder: Path) -> None:
    """Open each weights file far enough to know that it is whole.

    Raises:
        CheckpointError: naming the file that is absent or cut short.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = [single.name] if single.exists() else []
    if not names and index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{index} is no index of weights ({_first_line(error)}); download it again"
            ) from error
    for name in names:
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{folder} lacks {name}, which its index names; download it again")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} is damaged or cut short ({size} bytes: {_first_line(error)}); download it again"
            ) from error


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
        return f"{model} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
    name, kind = broken[0]
    what = (
        "have shapes other than its config says" if kind == "MISMATCH" else "are not all there or do not fit together"
    )
    return f"{model}: the tensors for {name} {what}; download it again"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
