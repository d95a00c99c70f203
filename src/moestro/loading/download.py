"""Fetches the files that a model needs from the hub into the hub's own cache, and goes on where it stopped.

huggingface_hub begins a file anew in each process. Here what came of a file stays beside the cache's contents, as
`blobs/CONTENT.part`, and the next run asks for the rest.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from ..errors import CheckpointError, MoestroError, RequestError, first_line
from ..planning.budget import format_bytes
from ..progress import BYTES, Bar, is_quiet, quiet
from .hub import Wanted, blob_path, explain, find_files, here_bytes, is_cut, local_path, part_path

_AT_ONCE = 4  # files
_TRIES = 5  # without a byte that is new
_WAIT_S = 0.5  # before the second try; twice as long before each further one
SMALL_BYTES = 16 << 20  # less is fetched without a word

Advance = Callable[[int], None]  # bytes that came, or, negative, that are asked for again


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> str:
    """The folder or GGUF file that a model's name stands for; what the hub has of it is fetched.

    Args:
        weights: False to fetch config and tokenizer alone.

    Raises:
        MoestroError: no such model, or it cannot be fetched; one line.
    """
    path = local_path(model)
    if path.is_dir():  # its files are checked by the reader of its kind
        return str(path)
    wanted = find_files(model, revision, weights=weights)
    return str(fetch(wanted))


def fetch(wanted: Wanted) -> Path:
    """Have all files on this machine.

    Says sizes and free disk before the first byte, then shows a bar, on standard error; neither where
    huggingface_hub's progress bars are disabled.

    Returns:
        The folder, or the first GGUF file.

    Raises:
        RequestError: too little disk is free. MoestroError: the hub does not give a file. One line.
    """
    if wanted.root is not None:
        return wanted.path(wanted.root)
    snapshot = wanted.cache / "snapshots" / wanted.commit
    lacking = [name for name in wanted.sizes if not (snapshot / name).exists()]
    if lacking:
        try:
            (wanted.cache / "blobs").mkdir(parents=True, exist_ok=True)
            by_blob = {wanted.blobs[name]: name for name in lacking}  # two files may have the same contents
            left = {name: wanted.sizes[name] - here_bytes(wanted, name) for name in by_blob.values()}
            _check_disk(wanted, sum(left.values()))
            _fetch_all(wanted, left, lacking)
            ref = wanted.cache / "refs" / wanted.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(wanted.commit)
        except MoestroError:
            raise
        except Exception as error:  # of a disk or a connection
            raise _explain(error, wanted) from error
    return wanted.path(snapshot)


def _check_disk(wanted: Wanted, n_bytes: int) -> None:
    """Say what will be fetched, and refuse what the disk has no place for."""
    free = shutil.disk_usage(wanted.cache).free
    here = wanted.n_bytes - n_bytes
    count = f"{len(wanted.sizes)} file{'s' if len(wanted.sizes) > 1 else ''}"
    sizes = f"{format_bytes(wanted.n_bytes)} in {count}, {format_bytes(here)} already here; {format_bytes(free)} free"
    if n_bytes > free:
        raise RequestError(
            f"{wanted.model} does not fit on the disk of {wanted.cache.parent}: {sizes}; free "
            f"{format_bytes(n_bytes - free)} more, or set HF_HOME to a folder on another disk"
        )
    if n_bytes >= SMALL_BYTES and not is_quiet():
        print(f"{wanted.model}: {sizes}", file=sys.stderr, flush=True)


def _fetch_all(wanted: Wanted, left: dict[str, int], names: list[str]) -> None:
    """Fetch contents, some at once, then give all that lack them their names; the first that fails stops the others."""
    total, stop = sum(left.values()), Event()
    with (
        quiet(total < SMALL_BYTES),
        Bar(f"fetching {wanted.model}", total, BYTES) as bar,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        jobs = [pool.submit(_fetch_file, wanted, name, bar.advance, stop) for name in left]
        try:
            for job in as_completed(jobs):
                job.result()
            # Gives contents that are here their names in the snapshot, and fetches nothing.
            list(pool.map(partial(_name_in_snapshot, wanted), names))
        except BaseException:  # an interrupt too
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _name_in_snapshot(wanted: Wanted, name: str) -> None:
    way = wanted.access
    hf_hub_download(wanted.repo, name, revision=wanted.commit, token=way.token, cache_dir=way.cache)


def _fetch_file(wanted: Wanted, name: str, advance: Advance, stop: Event) -> None:
    """Fetch the rest of one file's contents into the cache."""
    blob = blob_path(wanted, name)
    if blob.exists():
        return
    part = part_path(blob)
    try:
        with WeakFileLock(f"{part}.lock", timeout=0.1):
            with part.open("ab") as file:
                _fetch_rest(wanted, name, file, advance, stop)
            if not stop.is_set():
                part.replace(blob)
    except TimeoutError as error:
        raise RequestError(f"another process is fetching {name} of {wanted.repo}; run again when it is done") from error
    Path(f"{part}.lock").unlink(missing_ok=True)


def _fetch_rest(wanted: Wanted, name: str, file: BinaryIO, advance: Advance, stop: Event) -> None:
    """Append to `file` what it lacks, asking again for the rest after each cut."""
    size, failures = wanted.sizes[name], 0
    while (have := file.tell()) < size and not stop.is_set():
        try:
            _append(wanted, name, file, advance, stop)
            problem = "it ended early"
        except Exception as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if not is_cut(error) and not (status is not None and (status in (408, 429) or status >= 500)):
                raise
            problem = first_line(error) or type(error).__name__
        failures = 0 if file.tell() > have else failures + 1
        if failures == _TRIES:
            raise CheckpointError(
                f"the connection to the hub was cut {_TRIES} times at {format_bytes(have)} of {format_bytes(size)} of "
                f"{name} ({problem}); what came is kept: run again to go on"
            )
        if failures:
            stop.wait(_WAIT_S * 2 ** (failures - 1))


def _append(wanted: Wanted, name: str, file: BinaryIO, advance: Advance, stop: Event) -> None:
    """Append what one request gives of the rest of a file."""
    have, size = file.tell(), wanted.sizes[name]
    headers = build_hf_headers(token=wanted.access.token) | {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    url = hf_hub_url(wanted.repo, name, revision=wanted.commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        hf_raise_for_status(answer)
        _check_answer(answer, name, have, size)
        if answer.status_code == 200 and have:  # from a server without ranges: from the start again
            file.truncate(0)
            advance(-have)
            have = 0
        for chunk in answer.iter_bytes():
            if stop.is_set():
                return
            have += len(chunk)
            if have > size:
                file.truncate(0)
                raise ValueError(f"more than the {size} bytes of {name}")
            file.write(chunk)
            advance(len(chunk))


def _check_answer(answer: Any, name: str, have: int, size: int) -> None:
    """Refuse an answer that is not about the bytes that were asked for, a proxy's page say.

    Raises:
        ValueError: it is not.
    """
    length = answer.headers.get("Content-Length", size)
    if answer.status_code == 206:
        ranges = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        fits = ranges is not None and int(ranges[1]) == have and ranges[2] in (str(size), "*")
    else:
        fits = str(length) == str(size)
    if not fits:
        raise ValueError(f"{length} bytes with status {answer.status_code} for {name}, a file of {size} bytes")


def _explain(error: Exception, wanted: Wanted) -> MoestroError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RequestError(
            f"the disk of {wanted.cache.parent} is full; what came of {wanted.model} is kept: free some space, then "
            "run again"
        )
    return explain(error, wanted.repo, wanted.revision)
