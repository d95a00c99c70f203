"""Files that a user names: read whole, or found writable before the work is done."""

from __future__ import annotations

from pathlib import Path

from ..errors import RequestError


def read_text(path: str) -> str:
    """A text file's text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the text {path} cannot be read ({error}); give a text file in UTF-8") from None


def writable(path: str) -> Path:
    """A file that will be written, refused before the work is done."""
    found = Path(path)
    try:
        existed = found.exists()
        found.touch()
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}); name another file") from None
    if not existed:
        found.unlink()
    return found
