"""How `moestro inspect` prints what a model is."""

from __future__ import annotations

from ..console import print_lines, print_table
from ..loading.contents import Contents
from ..loading.packed.manifest import Manifest
from ..planning.budget import format_bytes


def print_contents(found: Contents) -> None:
    """Architecture, files and tokenizer, then a table of the parts."""
    shape = f"{found.layers} layers"
    if found.experts:
        shape += f", {found.experts} experts, {found.experts_per_token} a token"
    print_lines(f"{found.model}: {found.architecture}, {shape}")
    kind = found.kind if found.quantization is None else f"{found.kind}, quantized by {found.quantization}"
    files = f"{found.n_files} file{'s' if found.n_files > 1 else ''}"
    print_lines(f"weights    {format_bytes(found.n_bytes)} in {files}, {kind}")
    print_lines(f"context    {f'{found.context} tokens' if found.context else 'not said'}")
    print_lines(f"tokenizer  {'yes' if found.tokenizer else 'none'}")
    rows = [
        (
            name,
            ", ".join(sorted(part.formats, key=lambda kind: -part.formats[kind])),
            *(f"{part.bits:.2f}", f"{part.weights:,}", format_bytes(part.n_bytes)),
        )
        for name, part in found.parts.items()
    ]
    print_table(("part", "format", "bits a weight", "weights", "size"), rows, left=("format",))
    if found.transcode:
        print_lines(f"{', '.join(found.transcode)}: loads with --transcode 8, which rounds such weights to 8.25 bits")


def print_packed(folder: str, made: Manifest) -> None:
    """One line on a packed folder that was written."""
    experts = ", ".join(dict.fromkeys(layer.format for layer in made.layers))
    dense = ", ".join(dict.fromkeys(one.format for one in made.dense)) or "not packed"
    formats = f"experts in {experts}, dense layers in {dense}"
    print(f"{folder}: {format_bytes(made.n_bytes)} in {len(made.files) + 1} files, {formats}")
