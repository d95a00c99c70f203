"""Packed folders: a model as it lies in memory, written to disk and read back without quantizing (docs/formats.md)."""

from .manifest import MANIFEST, Manifest, is_packed
from .read import PackedFolder
from .restore import load_packed
from .write import write_packed

__all__ = ["MANIFEST", "Manifest", "PackedFolder", "is_packed", "load_packed", "write_packed"]
