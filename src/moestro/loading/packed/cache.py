"""Keeps what a load had to quantize as packed folders in the cache, so that the next load reads it.

An entry is a packed folder named by a hash of all that its bytes depend on: the checkpoint's fingerprint, its config,
the options, the solver and the format's version. So what is stale has another name, and is never used; what is damaged
is found by its checksums, removed and made again. Entries take at most half of the disk that is free without them; the
least recently used go first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ModelError, MoestroError, RequestError
from ...machine.folder import cache_folder as cache_folder
from ...planning.budget import format_bytes
from ...planning.spelling import spelled
from ...progress import is_quiet
from .kept_layers import SUFFIX, KeptLayers, kept_layers
from .manifest import MANIFEST, SOLVER, VERSION, Asked, Manifest
from .read import read_manifest
from .write import bytes_of_model, write_packed

logger = logging.getLogger("moestro")

_KEY_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """A packed folder of the cache, or the layers of one whose load was ended.

    manifest: None where there is none, or a damaged one. used_s: since 1970, of its last use.
    """

    folder: Path
    manifest: Manifest | None
    n_bytes: int
    used_s: float

    @property
    def is_unfinished(self) -> bool:
        """Whether these are layers, from which the same load goes on."""
        return self.folder.name.endswith(SUFFIX)


def key_of(fingerprint: str, config: Any, asked: Asked, dtype: str) -> str:
    """The name of the entry for a checkpoint and the options that make its weights.

    Args:
        config: Transformers', as the model is built from it. dtype: as it was asked for.
    """
    values = [fingerprint, config.to_json_string(), asdict(asked), dtype, SOLVER, VERSION]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:_KEY_DIGITS]


def entries() -> list[Entry]:
    """All entries, the least recently used first."""
    return sorted(_entries(), key=lambda entry: entry.used_s)


def find(key: str) -> Path | None:
    """The folder of an entry, which then counts as used now; None where there is none."""
    folder = cache_folder() / key
    try:
        os.utime(folder / MANIFEST)
    except OSError:
        return None
    return folder


def remove(folder: Path) -> None:
    """Remove an entry: first its moestro.json, without which it is none.

    Raises:
        RequestError: it cannot be removed.
    """
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except FileNotFoundError:
        return  # another process was faster
    except OSError as error:
        raise RequestError(f"{folder} cannot be removed: {error.strerror}") from error


@contextmanager
def kept_layers_of(key: str) -> Iterator[KeptLayers]:
    """Keep layers in the cache while the model of an entry is quantized."""
    with kept_layers(cache_folder() / f"{key}{SUFFIX}", key, lambda n_bytes: _has_room(key, n_bytes)) as kept:
        yield kept


def keep(model: Any, key: str, source: dict[str, Any], asked: Asked, beside: Any, kept: KeptLayers) -> None:
    """Write a loaded model to the cache; says its size and place before. What prevents it is one line of the log.

    Args:
        key: of the entry. source, asked, beside, kept: as `write_packed` takes them.
    """
    folder = cache_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if kept.has_begun:
            if not kept.has_room:
                return
        elif not _has_room(key, bytes_of_model(model)):
            return
        _clear(folder)
        write_packed(model, folder, source=source, asked=asked, beside=beside, kept=kept)
    except (MoestroError, OSError) as error:
        logger.warning("not kept in the cache: %s", error)


def remove_damaged(folder: Path, error: MoestroError) -> None:
    """Say that an entry is damaged, and remove it.

    Raises:
        The error, where it is none of a damaged or foreign folder.
    """
    if not isinstance(error, CheckpointError | ModelError):
        raise error
    logger.warning("the cache is made again: %s", error)
    remove(folder)


def _clear(folder: Path) -> None:
    """Remove what is in the place of an entry and is none, so that it does not refuse to be replaced."""
    if folder.exists():
        try:
            read_manifest(folder)
        except MoestroError:
            remove(folder)


def _has_room(key: str, n_bytes: int) -> bool:
    """Make room for an entry, and say its size and place; False where there is none, which the log says."""
    folder = cache_folder()
    if not _make_room(folder, n_bytes, folder / f"{key}{SUFFIX}"):
        return False
    if not is_quiet():
        not_so = spelled("cache", False)
        print(f"keeping {format_bytes(n_bytes)} in {folder / key} ({not_so}: not)", file=sys.stderr, flush=True)
    return True


def _make_room(folder: Path, n_bytes: int, layers: Path) -> bool:
    """Remove the least recently used entries until so many bytes fit; False where they would not fit alone.

    Args:
        layers: those of the entry that these bytes are for, which become a part of it.
    """
    found = entries()
    all_bytes = sum(entry.n_bytes for entry in found)
    found = [entry for entry in found if entry.folder != layers]
    taken = sum(entry.n_bytes for entry in found)
    most = (shutil.disk_usage(folder).free + all_bytes) // 2
    if n_bytes > most:
        logger.warning(
            "not kept in the cache: it takes %s, and half of the free disk of %s is %s",
            format_bytes(n_bytes),
            folder,
            format_bytes(most),
        )
        return False
    for entry in found:
        if taken + n_bytes <= most:
            break
        logger.info("removing %s, last used %s, from the cache", entry.folder, time.ctime(entry.used_s))
        remove(entry.folder)
        taken -= entry.n_bytes
    return True


def _entries() -> Iterator[Entry]:
    folder = cache_folder()
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            sizes = [one.stat() for one in path.rglob("*") if one.is_file()]
            used_s = (path / MANIFEST if (path / MANIFEST).exists() else path).stat().st_mtime
        except OSError:
            continue  # another process has just removed it
        try:
            manifest: Manifest | None = read_manifest(path)
        except MoestroError:
            manifest = None
        yield Entry(path, manifest, sum(one.st_size for one in sizes), used_s)
