"""A folder that appears under its name whole or not at all, whatever is killed at whatever moment.

It is written beside its place under another name, flushed to the disk, and then renamed. A folder that had the name
before is exchanged with it in one step where the system can do that (Linux), and else put aside first. What a killed
process left behind is removed by the next one that writes to the same place: a lock, which ends with its process, says
whether that process still runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

from ...errors import MoestroError, RequestError, first_line

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ENDING = ".partial"


@contextmanager
def new_folder(target: Path, may_replace: Callable[[Path], None]) -> Iterator[Path]:
    """Write a folder inside the block; it becomes `target` at its end, and is removed if the block fails.

    Args:
        target: its place; the folder that this is in must exist. may_replace: raises if the folder that is there must
            not be removed; called just before.

    Yields:
        The folder to write into, empty.

    Raises:
        RequestError: the disk is full, or it cannot be written there; one line.
    """
    working = target.parent / f".{target.name}.{secrets.token_hex(4)}{_ENDING}"
    try:
        _remove_leftovers(target)
        with _locked(working):
            try:
                working.mkdir()
                yield working
                for path in (working, *(one for one in working.rglob("*") if one.is_dir())):
                    flush_folder(path)
                _publish(working, target, may_replace)
                flush_folder(target.parent)
            finally:
                shutil.rmtree(working, ignore_errors=True)  # the old folder, after an exchange
    except MoestroError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise RequestError(
                f"the disk of {target.parent} is full; nothing is kept of {target.name}: free some space, or name a "
                "folder on another disk"
            ) from error
        raise RequestError(f"{target} cannot be written: {first_line(error)}; name another folder") from error


def flush_folder(path: Path) -> None:
    """Have the disk keep a folder's list of names; nothing where the system has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(working: Path, target: Path, may_replace: Callable[[Path], None]) -> None:
    while True:
        if target.exists() or target.is_symlink():
            _ask(may_replace, target)
            _replace(working, target)
            return
        try:
            working.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                raise


def _ask(may_replace: Callable[[Path], None], target: Path) -> None:
    """Ask up to five times, since another process may exchange the folder while its files are looked at."""
    for _ in range(4):
        with suppress(RequestError):
            may_replace(target)
            return
    may_replace(target)


def _replace(working: Path, target: Path) -> None:
    """Put `working` in the place of `target`, which is then in the place of `working`."""
    if sys.platform == "linux" and _exchange(working, target):
        return
    aside = working.with_name(f"{working.name}.old")
    target.rename(aside)
    try:
        working.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(working)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the disk's file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(other))


@contextmanager
def _locked(working: Path) -> Iterator[None]:
    lock = _lock_of(working)
    try:
        with WeakFileLock(lock, timeout=0.1):
            yield
    finally:
        with suppress(OSError):
            lock.unlink()


def _lock_of(working: Path) -> Path:
    return working.with_name(f"{working.name}.lock")


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed left of folders for this place."""
    folders = set(target.parent.glob(f".{target.name}.*{_ENDING}"))
    locks = target.parent.glob(
        f".{target.name}.*{_ENDING}.lock"
    )  # some of a folder that was not there yet, or no longer
    for path in folders | {lock.with_suffix("") for lock in locks}:
        with suppress(Timeout), _locked(path):
            shutil.rmtree(path, ignore_errors=True)
