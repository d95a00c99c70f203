"""Keeps what torch.compile cannot trace out of its graphs: kernels are given addresses, which tracing has none of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Break torch.compile's graph around a function; `torch.compiler.disable` alone would cost eager calls more."""
    untraced: Callable[P, R] = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return untraced(*args, **kwargs)
        return function(*args, **kwargs)

    return call
