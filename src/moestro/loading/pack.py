"""Make a packed folder of a model: load it on the CPU, and write it as it lies in memory.

Layers that have to be quantized are kept beside the target meanwhile, so that the same command goes on from there.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from ..planning.options import ModelOptions, Options
from .config import MoestroConfig
from .download import resolve
from .hub import find_files
from .load import load_tokenizer
from .model import load_checkpoint
from .once import remembering
from .packed.beside import write_beside
from .packed.fingerprint import fingerprint, name_of
from .packed.kept_layers import SUFFIX, kept_layers
from .packed.manifest import SOLVER, VERSION, Manifest, is_packed
from .packed.read import read_manifest
from .packed.restore import asked_bits
from .packed.write import refuse_replacing, write_packed


def pack(model: str, target: Path, source: ModelOptions, options: Options) -> Manifest:
    """Write a packed folder, which is a model like any other.

    Args:
        model: as `moestro.load` takes it. target: the folder to write; a packed one is replaced.
        source, options: as `moestro.load` takes them; the device is the CPU.

    Raises:
        MoestroError: one line on what was found, what was needed and what to do.
    """
    refuse_replacing(target)
    config = MoestroConfig(**{**options.to_dict(), "device": "cpu", "fuse": False})
    asked = asked_bits(config).settled()
    with remembering(), ExitStack() as context:
        wanted = find_files(model, source.revision)
        found = {"model": name_of(model, wanted), "fingerprint": fingerprint(wanted)}
        other_config = None if source.config is None else fingerprint(find_files(source.config, weights=False))
        key = json.dumps([found, other_config, source.dtype, asdict(asked), SOLVER, VERSION])
        layers = target.with_name(f".{target.name}{SUFFIX}")
        kept = context.enter_context(kept_layers(layers, key, make_room=lambda n_bytes: True))
        loaded = load_checkpoint(model, config, source, kept)
        path = Path(resolve(model, source.revision))
        other = None if source.config is None else Path(resolve(source.config, weights=False))
        own_files = source.tokenizer is None and path.is_dir() and not any(path.glob("*.gguf"))
        trusted = source.trust_remote_code

        def beside(folder: Path) -> None:
            def tokenizer() -> object:
                return load_tokenizer(
                    model, revision=source.revision, tokenizer=source.tokenizer, trust_remote_code=trusted
                )

            write_beside(folder, path, loaded, other, None if own_files else tokenizer)

        if path.is_dir() and is_packed(path):
            asked = read_manifest(path).asked
        return write_packed(loaded, target, source=found, asked=asked, beside=beside, kept=kept)
