"""Load a plain checkpoint whose weights must be quantized: from the cache where it is there, else it is kept there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import MoestroError
from ..planning.options import ModelOptions
from .config import MoestroConfig
from .hub import find_files
from .packed import cache
from .packed.beside import write_beside
from .packed.fingerprint import fingerprint, name_of
from .packed.kept_layers import KeptLayers
from .packed.manifest import Asked
from .packed.read import PackedFolder
from .packed.restore import asked_bits, load_packed

_FLOAT_BITS = 16


def load_cached(
    model: str,
    hf_config: Any,
    auto: Any,
    config: MoestroConfig,
    dtype: Any,
    options: ModelOptions,
    places: tuple[Path, Path | None],
    load: Callable[[KeptLayers | None], Any],
) -> Any:
    """The model, from the cache if it can be.

    Args:
        model, hf_config, auto, config, dtype: as `load_packed` takes them; the config is the checkpoint's.
        options: the model's. places: the checkpoint's folder, and the one that its config was taken from instead.
        load: loads the checkpoint itself, keeping layers or not.

    Raises:
        As `load` and `load_packed`.
    """
    asked = asked_bits(config).settled()
    if not config.cache or not any(bits is not None and bits < _FLOAT_BITS for bits in _bits(asked)):
        return load(None)
    wanted = find_files(model, options.revision)
    made_of = fingerprint(wanted)
    key = cache.key_of(made_of, hf_config, asked, str(dtype))
    if (found := cache.find(key)) is not None:
        try:
            folder = PackedFolder(model, found)
            return load_packed(folder, hf_config, auto, config, dtype, options.trust_remote_code)
        except MoestroError as error:
            cache.remove_damaged(found, error)
    with cache.kept_layers_of(key) as kept:
        loaded = load(kept)
        source = {"model": name_of(model, wanted), "fingerprint": made_of}
        beside = partial(write_beside, source=places[0], model=loaded, other=places[1], tokenizer=None)
        cache.keep(loaded, key, source, asked, beside, kept)
    return loaded


def _bits(asked: Asked) -> tuple[int | None, ...]:
    return asked.expert_bits, asked.dense_bits, asked.head_bits
