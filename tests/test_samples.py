"""Samples of tests with many cells (conftest.py): what they keep and what they leave to the long run."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import _rest


def cells(*sizes: int) -> list[Any]:
    """As many cells as parameters of so many values have."""
    return [
        SimpleNamespace(
            nodeid=f"test[{place}]", callspec=SimpleNamespace(indices=dict(zip("abc", place, strict=False)))
        )
        for place in product(*map(range, sizes))
    ]


@pytest.mark.parametrize("sizes", [(7,), (3, 5), (2, 9), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_sample_has_each_value_of_each_parameter_where_it_can(sizes: tuple[int, ...], seed: int) -> None:
    every = cells(*sizes)
    for count in range(1, len(every) + 2):
        rest = _rest(every, count, seed)
        kept = [cell for cell in every if cell not in rest]
        assert len(kept) == min(count, len(every))
        assert rest == _rest(every[::-1], count, seed), "the order in which tests are found decides"
        seen = [{cell.callspec.indices[name] for cell in kept} for name in "abc"[: len(sizes)]]
        if count >= sum(sizes):
            assert [len(values) for values in seen] == list(sizes)


def test_another_seed_draws_others() -> None:
    assert len({tuple(cell.nodeid for cell in _rest(cells(6, 6), 9, seed)) for seed in range(8)}) > 1
