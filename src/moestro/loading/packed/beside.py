"""The small files of a packed folder: config.json, generation_config.json, tokenizer and code of a checkpoint's own."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...planning.spelling import spelled
from ..choose import MANIFEST, beside_weights

logger = logging.getLogger("moestro")

_CONFIG = "config.json"
_ALWAYS = ("generation_config.json", ".py")


def write_beside(
    folder: Path, source: Path, model: Any, other: Path | None, tokenizer: Callable[[], Any] | None
) -> None:
    """Write what stands beside the weights.

    Args:
        folder: to write into. source: the checkpoint's folder or GGUF file. model: as it was loaded.
        other: the folder that the config was taken from instead.
        tokenizer: gives the tokenizer to write; None to copy the checkpoint's own files.
    """
    config = (other or source) / _CONFIG
    is_gguf = source.is_file() or (not any(source.glob("*.safetensors")) and any(source.glob("*.gguf")))
    if config.is_file() and not (is_gguf and other is None):
        values = json.loads(config.read_bytes())
        for part in (values, values.get("text_config")):
            if isinstance(part, dict):
                part.pop("quantization_config", None)
    else:
        own = copy.deepcopy(model.config)
        if hasattr(own, "quantization_config"):
            del own.quantization_config
        values = json.loads(own.to_json_string())
    (folder / _CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    if not is_gguf:
        _copy(source, folder, whole=tokenizer is None)
    if tokenizer is None:
        return
    try:
        tokenizer().save_pretrained(folder)
    except CheckpointError as error:
        given = spelled("tokenizer")
        logger.warning("%s: the packed folder has no tokenizer; name one with %s where it is run", error, given)


def _copy(source: Path, folder: Path, *, whole: bool) -> None:
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    for name in beside_weights(names):
        if name in (_CONFIG, MANIFEST) or name.endswith(".index.json") or not (whole or name.endswith(_ALWAYS)):
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
