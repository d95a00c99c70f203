"""Drawing with matplotlib, an optional package."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError


def plotting() -> Any:
    """Matplotlib's pyplot, set up so that equal pictures make equal SVG files.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise RequestError("--plot needs matplotlib; install it with: pip install 'moestro[plots]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moestro"
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    return pyplot
