"""Files that a user names: read them, or find out before the work whether they can be written."""

from __future__ import annotations

from pathlib import Path

from ..errors import RequestError


def read_text(path: str) -> str:
    """The text of a file in UTF-8.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the text {path} cannot be read ({error}); give a text file in UTF-8") from None


def writable(path: str) -> Path:
    """The path of a file that will be written later.

    Raises:
        RequestError: it cannot be written.
    """
    found = Path(path)
    try:
        existed = found.exists()
        found.touch()
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}); name another file") from None
    if not existed:
        found.unlink()
    return found
