"""From a folder or a file to the source that reads it."""

from __future__ import annotations

from pathlib import Path

from ...errors import ModelError, RequestError
from ...planning.spelling import spelled
from ..checkpoint import weight_files
from .base import Source
from .gguf import GgufSource
from .safetensors import SafetensorsSource


def open_source(
    model: str,
    *,
    config: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    transcode: int | None = None,
) -> Source:
    """The source of a checkpoint on this machine.

    Args:
        model: a folder of safetensors, a GGUF file, the first of several, or a folder of one GGUF.
        config, tokenizer: a folder or hub id to take the config or the tokenizer from instead of the checkpoint.
        transcode: bits to which a GGUF file's types that no format here keeps are rounded; None to refuse them.

    Raises:
        MoestroError: there is none, or none that Moestro reads.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"{model} is no checkpoint; name a folder of safetensors or a .gguf file")
    if not path.exists():
        raise ModelError(f"no file or folder {model}")
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if files and (path.is_file() or not weight_files(path)):  # folders of GGUF files often have a config.json beside
        return GgufSource(files, config=config, tokenizer=tokenizer, transcode=transcode is not None)
    if transcode is not None:
        given = spelled("transcode", transcode)
        raise RequestError(f"{given} is for GGUF files, and {model} is none; leave it out")
    return SafetensorsSource(model, path, config=config, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
