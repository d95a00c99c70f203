"""What is refused before torch is imported, which takes seconds: no model, one that is nowhere, unreadable files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import RequestError
from ..planning.options import ModelOptions, ReplayOptions
from ..simulate.routing import routing_of
from ..text.files import writable


def check_named(model: str | None, source: ModelOptions) -> None:
    """Refuse a request that names no model, or two.

    Raises:
        RequestError: a line that says which.
    """
    if not model and source.shape is None:
        raise RequestError("name one model: a folder, a hub id, demo, or a shape with random weights (--shape NAME)")
    if model and source.shape is not None:
        raise RequestError(f"both MODEL ({model}) and --shape ({source.shape}); name one of them")


def check_model(model: str | None, source: ModelOptions, *, draft: str | None = None) -> None:
    """Refuse a request that names no model, two, or one that is neither here nor on the hub, which is asked.

    Args:
        draft: another model that is loaded.

    Raises:
        RequestError: no model or two of them. MoestroError: no such model; one line.
    """
    check_named(model, source)
    from ..loading.hub import find_files, local_path

    for name in filter(None, (model, source.config, source.tokenizer, draft)):
        revision = source.revision if name == model else None
        if not local_path(name).is_dir():  # a folder is checked by the reader of its kind
            find_files(name, revision, weights=False)


def check_readable(path: str | None, what: str) -> None:
    """Refuse a file that cannot be read.

    Raises:
        RequestError: a line that names it.
    """
    if path is None:
        return
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise RequestError(f"the {what} {path} cannot be read: {error.strerror}") from None


def check_routing(trace: str | None, options: ReplayOptions) -> None:
    """Refuse a replay that names neither a trace nor a shape, or both, or a shape of unknown routing.

    Raises:
        RequestError: a line that says which.
    """
    if trace is None and options.shape is None:
        raise RequestError("name a TRACE that moestro trace wrote, or a real shape (--shape mixtral-8x7b)")
    if trace is not None and options.shape is not None:
        raise RequestError(f"both TRACE ({trace}) and --shape ({options.shape}); name one of them, or use --as-shape")
    if options.shape is not None:
        if options.as_shape is not None:
            raise RequestError("--as-shape is for a trace; leave it out with --shape")
        routing_of(options.shape)


def check_plot(path: str | None) -> None:
    """Refuse a picture that cannot be drawn or written.

    Raises:
        RequestError: there is no matplotlib, or the file cannot be written.
    """
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib; install it with: pip install 'moestro[plots]'")
    writable(path)
