"""Where Moestro keeps what it made on this machine: quantized models, and the machine's rates. Imports no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "MOESTRO_CACHE"


def cache_folder() -> Path:
    """MOESTRO_CACHE, or `moestro` in the folder that the platform has for caches."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "moestro" / "Cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/moestro").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moestro"
