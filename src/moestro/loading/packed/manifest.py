"""What moestro.json says of a packed folder: its formats, and where each run of bytes lies, with its checksum.

The file is `{"crc32c":"<8 hex digits>","packed":<values>}` and a newline; the checksum is that of the bytes of
<values>. Knows no weights and no model. Imports no torch, so that `moestro inspect` can read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import CheckpointError, ModelError
from ...planning.options import FITS, FITTED_BITS
from ..choose import EXPERT_FILE
from ..choose import MANIFEST as MANIFEST  # which the others here have from this file

VERSION = 2  # of the folder: raised when what lies in it, or a number format of memory/formats, changes its bytes
SOLVER = "moestro 2"  # what quantizes weights here: changed with what memory/formats/quantize.py gives
ALIGN_BYTES = 4096  # each run of bytes begins on a page
DENSE_FILE, REST_FILE = "dense.bin", "rest.safetensors"


def filled_up(n_bytes: int) -> int:
    """The bytes of a run with what fills it up."""
    return -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES


def expert_file(layer: int) -> str:
    """The name of the file with a layer's experts; layers count from 0, files from 1."""
    return f"experts-{layer + 1:05d}.bin"


_FRAME = re.compile(rb'\{"crc32c":"([0-9a-f]{8})","packed":(.*)\}\n', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a file, filled up with zeros to a multiple of ALIGN_BYTES, which `n_bytes` does not count."""

    file: str
    offset: int
    n_bytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one module, all of one format and shape. hidden, neurons: D, F. weights: of one expert."""

    module: str
    format: str
    block: int
    hidden: int
    neurons: int
    has_gate: bool
    has_bias: bool
    experts: tuple[Run, ...]

    @property
    def weights(self) -> int:
        """Of all experts, without biases."""
        return len(self.experts) * self.hidden * self.neurons * (3 if self.has_gate else 2)


@dataclass(frozen=True, slots=True)
class Dense:
    """A packed matrix outside the experts.

    dtype: of the weight that it stands for. order: whether rest.safetensors has an order of its columns.
    """

    name: str
    format: str
    rows: int
    columns: int
    dtype: str
    order: bool
    run: Run


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that made the weights what they are; None where they are the checkpoint's own.

    fit: how fewer bits were found, None where no weights have so few.
    """

    expert_bits: int | None = None
    dense_bits: int | None = None
    head_bits: int | None = None
    transcode: int | None = None
    fit: str | None = None

    def settled(self) -> Asked:
        """With the fit that a load by these options takes."""
        is_fitted = {self.expert_bits, self.dense_bits, self.head_bits} & {*FITTED_BITS}
        return replace(self, fit=(self.fit or FITS[0]) if is_fitted else None)


@dataclass(frozen=True, slots=True)
class File:
    """A file of the folder: its bytes, and its checksum where it is no file of runs, which have their own."""

    n_bytes: int
    crc: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What moestro.json says.

    dtype: of the model, as torch names it. source: what it was made from, by name and fingerprint. made_by: our
    version. is_marked: whether Transformers had marked the model's configs as quantized, by which jamba chooses between
    two formulas that differ in the last bit.
    """

    source: Mapping[str, Any]
    asked: Asked
    dtype: str
    layers: tuple[Layer, ...]
    dense: tuple[Dense, ...]
    files: Mapping[str, File]
    is_marked: bool = False
    made_by: str = ""
    solver: str = SOLVER
    version: int = VERSION

    @property
    def n_bytes(self) -> int:
        """Of all files but moestro.json."""
        return sum(file.n_bytes for file in self.files.values())

    def text(self, crc32c: Callable[[bytes], int]) -> bytes:
        """The contents of moestro.json."""
        values = json.dumps(asdict(self), separators=(",", ":")).encode()
        return b'{"crc32c":"%08x","packed":%b}\n' % (crc32c(values), values)


def is_packed(folder: Path) -> bool:
    """Whether a folder is a packed one.

    Raises:
        CheckpointError: it has experts of one, but no moestro.json.
    """
    if (folder / MANIFEST).is_file():
        return True
    if folder.is_dir() and any(EXPERT_FILE.fullmatch(path.name) for path in folder.iterdir()):
        raise CheckpointError(f"{folder} lacks {MANIFEST} of a packed folder; {AGAIN}")
    return False


AGAIN = "make it again with moestro pack, or copy it again"


def slow_crc32c(data: bytes) -> int:
    """As `compute/checksum.py` has it, in plain Python, for what does without torch."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def parse_manifest(folder: str, text: bytes, crc32c: Callable[[bytes], int] = slow_crc32c) -> Manifest:
    """What a moestro.json says.

    Args:
        folder: for messages. crc32c: what makes checksums.

    Raises:
        CheckpointError: it is damaged. ModelError: another version of Moestro made it.
    """
    frame = _FRAME.fullmatch(text)
    if frame is None or crc32c(frame[2]) != int(frame[1], 16):
        raise CheckpointError(f"{folder}: its {MANIFEST} is damaged or cut short ({len(text)} bytes); {AGAIN}")
    try:
        values = json.loads(frame[2])
        if (version := values["version"]) != VERSION:
            raise ModelError(
                f"{folder} is a packed folder of format version {version}, and this Moestro reads version {VERSION}; "
                "make it again with moestro pack"
            )
        return _manifest(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: its {MANIFEST} is not what moestro pack writes ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def _manifest(values: dict[str, Any]) -> Manifest:
    files = {_name(name): File(_whole(one["n_bytes"]), one["crc"]) for name, one in values["files"].items()}

    def run(one: Mapping[str, Any]) -> Run:
        made = Run(one["file"], _whole(one["offset"]), _whole(one["n_bytes"]), _whole(one["crc"]))
        if made.offset % ALIGN_BYTES or made.offset + made.n_bytes > files[made.file].n_bytes:
            raise ValueError(f"bytes {made.offset} to {made.offset + made.n_bytes} of {made.file}")
        return made

    layers = tuple(Layer(**{**one, "experts": tuple(map(run, one["experts"]))}) for one in values["layers"])
    dense = tuple(Dense(**{**one, "run": run(one["run"])}) for one in values["dense"])
    return Manifest(**{**values, "asked": Asked(**values["asked"]), "layers": layers, "dense": dense, "files": files})


def _name(name: str) -> str:
    """A file's path within the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"a file {name!r}")
    return name


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a size of {value!r}")
    return value
