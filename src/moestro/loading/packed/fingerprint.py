"""What tells one checkpoint from another without reading its weights: its commit on the hub, or its files.

Of files here these are names, sizes, times and headers.

>>> from moestro.loading.hub import find_files
>>> len(fingerprint(find_files("demo")))
64
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..hub import Wanted

_HEAD_BYTES = 1 << 20  # of a file: small files whole, of GGUF the beginning of what describes it
_MOST_BYTES = 1 << 28  # of a header of safetensors


def fingerprint(wanted: Wanted) -> str:
    """A hash of what a model's files are, in hexadecimal.

    Args:
        wanted: the model's files, here or in the hub's cache.

    Raises:
        OSError: a file cannot be read.
    """
    if commit := _commit(wanted):
        return _hash(["hub", wanted.repo, commit, sorted(wanted.weights)])
    assert wanted.root is not None
    return _hash(["files", [_file(wanted.root, name) for name in sorted(wanted.sizes)]])


def name_of(model: str, wanted: Wanted) -> str:
    """What a model is called, without where it lies on this machine."""
    commit = _commit(wanted)
    return f"{wanted.repo}@{commit}" if commit else Path(model).name


def _commit(wanted: Wanted) -> str:
    """The commit of a repository of the hub; without a connection, that of the snapshot in its cache. Else empty."""
    return wanted.commit or (wanted.root.name if wanted.repo and wanted.root is not None else "")


def _file(root: Path, name: str) -> list[Any]:
    path = root / name
    found = path.stat()
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if name.endswith(".safetensors") and len(head) > 8:
            size = min(int.from_bytes(head[:8], "little"), _MOST_BYTES)
            head += file.read(max(0, 8 + size - len(head)))
    return [name, found.st_size, found.st_mtime_ns, hashlib.sha256(head).hexdigest()]


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
