"""What `load.py` names: the model of a checkpoint's folder, a hub id, `demo` or a random shape, and its tokenizer.

Errors of Transformers and safetensors about a bad checkpoint become one line each. Knows neither placement nor
policies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..devices import has_slots
from ..engine.forks import set_torch_threads
from ..errors import CheckpointError, ModelError, MoestroError, RequestError, first_line
from ..planning.effects import Kind, Setting, without_effect
from ..planning.options import DTYPES, METHOD, ModelOptions, Options
from ..planning.spelling import spelled
from ..progress import Bar, without_bars_of_transformers
from .cached import load_cached
from .checkpoint import check_files, give_attention, is_stored, read_config, refuse_code, tensor_names, wrong_prefix
from .config import MoestroConfig
from .download import resolve
from .first_check import check_before_fetch
from .hub import local_path
from .once import once, remembering
from .packed.kept_layers import KeptLayers
from .packed.manifest import is_packed
from .packed.read import PackedFolder
from .packed.restore import load_packed
from .plain import load_plain
from .plug import MoestroQuantizer  # noqa: F401  # registers the quantizer and the experts function
from .random_model import build_random_model, shape_config, shape_tokenizer
from .sources import open_source
from .sources.plain import Unproven
from .stored import load_stored

logger = logging.getLogger("moestro")


def load_model(model: str | None, source: ModelOptions, options: Options) -> PreTrainedModel:
    """Load a model with options that were checked; `moestro.load` says more.

    Args:
        model: a folder, a hub id, or "demo"; None where `source` names a shape.
    """
    config = MoestroConfig(**options.to_dict())
    logger.info("loading %s with %s", model or source.shape, config)
    if source.shape is not None:
        if config.threads is not None:
            set_torch_threads(config.threads)
        _refuse_transcode(config, source.shape)
        _say_without_effect(config, source, "shape")
        return build_random_model(
            source.shape, config, dtype=_dtype_of(source), seed=source.seed, attention=source.attn_implementation
        )
    assert model is not None
    return load_checkpoint(model, config, source)


def tokenizer_of(
    model: str | None,
    *,
    shape: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """As `moestro.load_tokenizer`."""
    if shape is not None:
        return shape_tokenizer(shape)
    if tokenizer is not None:
        return tokenizer_of(tokenizer, trust_remote_code=trust_remote_code)
    assert model is not None
    source = resolve(model, revision, weights=False)
    if is_packed(Path(source)):
        PackedFolder(model, Path(source), weights=False)  # refuses a tokenizer that is damaged
    elif is_stored(source):
        return open_source(source, trust_remote_code=trust_remote_code).tokenizer()
    read_config(model, source, trust_remote_code)  # first, since it says in one line that there is no such model
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise all kinds of exceptions
        refuse_code(model, error)
        raise CheckpointError(
            f"{model} has no tokenizer that Transformers can read; put its tokenizer.json beside the weights "
            f"({first_line(error)})"
        ) from error


def config_and_class(model: str | None, source: ModelOptions) -> tuple[Any, Any]:
    """What a model's config is, and Transformers' class of it, or None where its own code has that; loads no weights.

    Raises:
        MoestroError: as `load` does of the config.
    """
    if source.shape is not None:
        config: Any = shape_config(source.shape)
    else:
        assert model is not None
        found = resolve(model, source.revision, weights=False)
        other = None if source.config is None else resolve(source.config, weights=False)
        if is_stored(found) and not is_packed(Path(found)):
            opened = open_source(found, config=other, trust_remote_code=source.trust_remote_code)
            config = opened.config()
        else:
            config = read_config(source.config or model, other or found, source.trust_remote_code)
    kinds = _auto_class(config)._model_mapping.get(type(config), None)
    return config, kinds[0] if isinstance(kinds, (list, tuple)) else kinds


def load_checkpoint(
    model: str, config: MoestroConfig, options: ModelOptions, kept: KeptLayers | None = None
) -> PreTrainedModel:
    """As `load`, of a checkpoint.

    Args:
        kept: keeps layers that had to be quantized, in the place of the cache.
    """
    if config.threads is not None:
        set_torch_threads(config.threads)
    with remembering():
        return _load_checkpoint(model, config, _dtype_of(options), options, kept)


def _dtype_of(options: ModelOptions) -> Any:
    """The dtype that was asked for, a torch dtype or "auto"."""
    return "auto" if options.dtype == "auto" else getattr(torch, DTYPES[options.dtype])


def _load_checkpoint(
    model: str, quantization_config: MoestroConfig, dtype: Any, options: ModelOptions, kept: KeptLayers | None
) -> Any:
    trust_remote_code = options.trust_remote_code
    source = resolve(model, options.revision, weights=False)
    other = None if options.config is None else resolve(options.config, weights=False)
    check_before_fetch(model, options, quantization_config)
    if is_packed(Path(source)):
        if options.config is not None:
            raise RequestError(
                f"{model} is a packed folder, which has a config of its own; leave {spelled('config')} out"
            )
        _say_without_effect(quantization_config, options, "packed", model)
        folder = PackedFolder(model, Path(resolve(model, options.revision)))
        config = read_config(model, source, trust_remote_code)
        auto = _attending(config, options)
        return load_packed(folder, config, auto, quantization_config, dtype, trust_remote_code)
    if is_stored(source):
        _say_without_effect(quantization_config, options, "stored", model)
        source = resolve(model, options.revision)
        stored = open_source(
            source, config=other, trust_remote_code=trust_remote_code, transcode=quantization_config.transcode
        )
        config = stored.config()
        auto = _attending(config, options)
        return load_stored(source, stored, config, auto, quantization_config, dtype, trust_remote_code)
    _refuse_transcode(quantization_config, model)
    _say_without_effect(quantization_config, options, "plain", model)
    config = read_config(options.config or model, other or source, trust_remote_code)
    auto = _attending(config, options)
    source = resolve(model, options.revision)
    load_plain = partial(_load_plain, model, source, config, auto, quantization_config, dtype, trust_remote_code)
    places = Path(source), None if other is None else Path(other)
    if kept is not None:
        return load_plain(kept)
    return load_cached(model, config, auto, quantization_config, dtype, options, places, load_plain)


def _load_plain(
    model: str,
    source: str,
    config: Any,
    auto: Any,
    quantization_config: Any,
    dtype: Any,
    trust_remote_code: bool,
    kept: KeptLayers | None,
) -> Any:
    """The model of a checkpoint that is not quantized, from its mapped files or through Transformers' loader."""
    check_files(Path(source))
    with _loading_report() as report:
        try:
            try:
                loaded, unused = load_plain(source, auto, config, quantization_config, dtype, trust_remote_code, kept)
            except Unproven as why:
                logger.info("%s is read by Transformers, not from its mapped files: %s", model, why)
            else:
                _warn_of_unused(model, unused)
                return loaded
            with Bar("reading weights", None), without_bars_of_transformers():
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
        except Exception as error:  # of any kind: Transformers has none of its own for damaged checkpoints
            refuse_code(model, error)
            raise CheckpointError(_explain(model, report, error)) from error
    if missing := sorted(info["missing_keys"]):
        _check_prefix(model, source, auto, config, trust_remote_code)
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{model} has no {missing[0]}{more}; it is incomplete: download it again")
    _warn_of_unused(model, sorted(info["unexpected_keys"]))
    return loaded


def _say_without_effect(config: MoestroConfig, source: ModelOptions, kind: Kind, model: str = "") -> None:
    """Warn of options that change nothing here, once while a model and its draft are loaded."""
    setting = Setting(kind, has_slots(config.device), local_path(model).exists())
    for line in without_effect(config, source, setting):
        once(("said", line), partial(logger.warning, "%s", line))


def _warn_of_unused(model: str, names: list[str]) -> None:
    if names:
        logger.warning("%s has %d tensors that its config has no place for, such as %s", model, len(names), names[0])


def _refuse_transcode(config: MoestroConfig, model: str) -> None:
    """Refuse `transcode` for a model that is no GGUF file.

    Raises:
        RequestError: it was given.
    """
    if config.transcode is not None:
        given = spelled("transcode", config.transcode)
        raise RequestError(f"{given} is for GGUF files, and {model} is none; leave it out")


def _auto_class(config: Any) -> Any:
    """Transformers' auto class that has, for the config's `model_type`, a model that generates text.

    A family may have both a text model and one around it, for images or sound: there the config's `architectures`
    decides. A checkpoint with code of its own names the auto class in its `auto_map`.

    Raises:
        ModelError: there is no such class.
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


def _attending(config: Any, source: ModelOptions) -> Any:
    """The auto class of a config, which gets the attention that was asked for."""
    auto = _auto_class(config)
    kind = auto._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    give_attention(config, kind, source.attn_implementation, source.trust_remote_code)
    return auto


def _check_prefix(model: str, source: str, auto: Any, config: Any, trust_remote_code: bool) -> None:
    """Refuse a checkpoint that has the missing tensors under names with another prefix.

    Raises:
        CheckpointError: a line with the two prefixes.
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
    """Collect the lines that Transformers logs about a load inside the block, instead of printing them."""
    report: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: report.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    propagate, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.INFO)  # at WARNING, Transformers also warns of parallel plans
    logger.addHandler(handler)
    try:
        yield report
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _explain(model: str, report: list[str], error: Exception) -> str:
    """One line on why a load failed, from Transformers' report or, where it names no tensor, from the error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(report))
    broken = re.findall(r"^(\S.*?)\s*\|\s*(CONVERSION|MISMATCH)", text, re.MULTILINE)
    if not broken:
        return f"{model} cannot be loaded: {type(error).__name__}: {first_line(error)}"
    name, kind = broken[0]
    what = (
        "have shapes other than its config says" if kind == "MISMATCH" else "are not all there or do not fit together"
    )
    return f"{model}: the tensors for {name} {what}; download it again"
