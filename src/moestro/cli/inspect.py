"""How `moestro inspect` prints what a model is."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..loading.contents import Contents
from ..loading.packed.manifest import Manifest
from ..planning.budget import format_bytes


def print_contents(found: Contents) -> None:
    """Architecture, files and tokenizer, then a table of the parts."""
    console = Console(width=100, highlight=False)
    shape = f"{found.layers} layers"
    if found.experts:
        shape += f", {found.experts} experts, {found.experts_per_token} a token"
    console.print(f"{found.model}: {found.architecture}, {shape}", markup=False)
    kind = found.kind if found.quantization is None else f"{found.kind}, quantized by {found.quantization}"
    files = f"{found.n_files} file{'s' if found.n_files > 1 else ''}"
    console.print(f"weights    {format_bytes(found.n_bytes)} in {files}, {kind}")
    console.print(f"context    {f'{found.context} tokens' if found.context else 'not said'}")
    console.print(f"tokenizer  {'yes' if found.tokenizer else 'none'}")
    table = Table()
    for column in ("part", "format", "bits a weight", "weights", "size"):
        table.add_column(column, justify="left" if column in ("part", "format") else "right", no_wrap=column == "part")
    for name, part in found.parts.items():
        formats = ", ".join(sorted(part.formats, key=lambda kind: -part.formats[kind]))
        table.add_row(name, formats, f"{part.bits:.2f}", f"{part.weights:,}", format_bytes(part.n_bytes))
    console.print(table)
    if found.transcode:
        console.print(f"{', '.join(found.transcode)}: loads with --transcode 8, which rounds such weights to 8.25 bits")


def print_packed(folder: str, made: Manifest) -> None:
    """One line on a packed folder that was written."""
    experts = ", ".join(dict.fromkeys(layer.format for layer in made.layers))
    dense = ", ".join(dict.fromkeys(one.format for one in made.dense)) or "not packed"
    formats = f"experts in {experts}, dense layers in {dense}"
    print(f"{folder}: {format_bytes(made.n_bytes)} in {len(made.files) + 1} files, {formats}")
