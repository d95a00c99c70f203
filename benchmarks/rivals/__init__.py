"""Moestro beside other engines: llama.cpp for whole models, kt-kernel and torch's linears for layers.

python -m benchmarks.rivals decode --shape olmoe-1b-7b --bits 4
python -m benchmarks.rivals kernels --shape olmoe-1b-7b
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def installed(module: str, package: str) -> str | None:
    """The version of `package` if `module` can be found, else None. Does not import the module."""
    if find_spec(module) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
