"""Floats are repacked in vectors where a panel's place and size allow it; all places and sizes give the same panels."""

from __future__ import annotations

import pytest
import torch

from moestro.compute.repack import pack_stored_matrix
from moestro.memory.formats import FLOAT_FORMATS, format_named


@pytest.mark.parametrize("dtype", FLOAT_FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 8), (48, 70), (33, 131), (16, 6), (16, 7), (64, 512)])
@pytest.mark.parametrize("offset_bytes", [0, 2, 8, 16])
def test_panels_hold_the_matrix_and_nothing_beside_them_changes(
    dtype: torch.dtype, rows: int, columns: int, offset_bytes: int
) -> None:
    matrix, fmt = torch.randn(rows, columns).to(dtype), format_named(FLOAT_FORMATS[dtype])
    size = fmt.matrix_bytes(rows, columns)
    memory = torch.full((size + 64,), 255, dtype=torch.uint8)
    panels = memory[offset_bytes : offset_bytes + size]
    pack_stored_matrix(panels, matrix, None, None, threads=2)
    assert torch.equal(panels.view(-1, fmt.panel_bytes(columns)), fmt.pack(matrix))
    assert (memory[:offset_bytes] == 255).all()
    assert (memory[offset_bytes + size :] == 255).all()
