"""Packed folders are read by other versions than wrote them: a change of bytes must come with a change of a version."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

from moestro.loading.packed.manifest import SOLVER, VERSION
from moestro.memory.formats import MATRIX_FORMATS, strided_format
from moestro.memory.formats.strided import write_matrix
from test_formats import CODED, random_coded
from test_strided import KINDS, random_strided

RECORDED = Path(__file__).parent / "data/format_versions.json"


def _checksums() -> dict[str, dict[str, int]]:
    """Of panels of each format, by the version that they depend on: random codes, and weights quantized here."""
    written, quantized = {}, {}
    for fmt in CODED:
        torch.manual_seed(5)
        written[fmt.name] = zlib.crc32(fmt.write(random_coded(fmt, 20, 330)).numpy().tobytes())
    for kind in KINDS:
        fmt = strided_format(*kind)
        written[fmt.name] = zlib.crc32(write_matrix(fmt, random_strided(fmt, 2 * fmt.group, 330)).numpy().tobytes())
    torch.manual_seed(5)
    weights = torch.randn(20, 330) / 64
    for name, fmt in MATRIX_FORMATS.items():
        quantized[name] = zlib.crc32(fmt.pack(weights).numpy().tobytes())
    return {f"version {VERSION}": written, f"solver {SOLVER}": quantized}


def test_bytes_change_with_a_version_only() -> None:
    """If this fails, raise VERSION or SOLVER in loading/packed/manifest.py, then run this file as a script."""
    recorded, found = json.loads(RECORDED.read_text()), _checksums()
    assert found.keys() == recorded.keys(), "record the new version: python tests/test_format_versions.py"
    for version, checksums in found.items():
        changed = {name for name in checksums if recorded[version].get(name) != checksums[name]}
        assert not changed, f"bytes of {sorted(changed)} are others than at {version}"


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(_checksums(), indent=0) + "\n")
