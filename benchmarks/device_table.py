"""The table of a device report: a line for each test run, rate, run and policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from moestro.bench.machine_card import GIB

Row = tuple[str, str, str]  # what, value, note

RATE_ROWS = {
    "dram_read_gbps": ("DRAM read", "GB/s"),
    "dram_read_together_gbps": ("DRAM read while copying", "GB/s"),
    "link_h2d_together_gbps": ("copying to the GPU meanwhile", "GB/s"),
    "link_h2d_gbps": ("link to the GPU, registered memory", "GB/s"),
    "link_d2h_gbps": ("link from the GPU, registered memory", "GB/s"),
    "link_h2d_pageable_gbps": ("link to the GPU, pageable memory", "GB/s"),
    "link_d2h_pageable_gbps": ("link from the GPU, pageable memory", "GB/s"),
    "gpu_memory_gbps": ("GPU memory, read + written", "GB/s"),
    "host_register_gibps": ("cudaHostRegister", "GiB/s"),
}


def report_table(report: dict[str, Any]) -> Table:
    """Lines of what was done, its value and a note, from the dict that benchmarks/device.py saves."""
    title = f"{report['machine']['gpu'] or report['machine']['cpu']}{', toy sizes' if report['toy'] else ''}"
    table = Table(title=title)
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for rows in (
        [_test_row(report["tests"])],
        _rate_rows(report["rates"]),
        _run_rows(report["runs"]),
        _hybrid_rows(report["hybrid"]),
    ):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _test_row(tests: dict[str, Any]) -> Row:
    if not tests["ran"]:
        return "tests", "-", tests["note"]
    counted = f"{tests['passed']} passed, {tests['failed']} failed" if "passed" in tests else "no counts"
    notes = [f"{tests['skipped']} skipped"] if "skipped" in tests else []
    return "tests", counted, ", ".join([*notes, f"{tests['wall_s']} s", *filter(None, [tests.get("error")])])


def _rate_rows(rates: dict[str, Any]) -> Iterator[Row]:
    if "error" in rates:
        yield "rates", "failed", rates["error"]
        return
    notes: dict[str, str] = dict(note.split(": ", 1) for note in rates["notes"])
    if rates["dram_read_threads"]:
        notes["dram_read_gbps"] = f"best of 1..{rates['physical_cores']} threads: {rates['dram_read_threads']}"
    if rates["together_threads"]:
        notes["dram_read_together_gbps"] = f"{rates['together_threads']} threads"
    for name, (label, unit) in RATE_ROWS.items():
        value = rates[name]
        yield label, "-" if value is None else f"{value:.1f} {unit}", notes.pop(name, "")
    yield from (("note", "", f"{about}: {note}") for about, note in notes.items())


def _run_rows(runs: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for run in runs:
        if not run["ok"]:
            yield f"run {run['shape']}", "failed", run["error"]
            continue
        peak = ", ".join(f"{tier} {size / GIB:.1f} GiB" for tier, size in run["peak_bytes"].items() if size)
        speeds = f"{run['prefill_tok_s']:.2f} / {run['decode_tok_s']:.2f} tok/s"
        yield (f"run {run['shape']}: prefill / decode", speeds, f"first token {run['ttft_s']:.2f} s; peak {peak}")


def _hybrid_rows(reports: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for report in reports:
        if not report["ok"]:
            yield report["command"], "failed", report["error"]
            continue
        title = f"{report['shape']}, {report['layers']} layers, {report['bits']} bits"
        for row in report["rows"]:
            link = "full link" if row["link_gbps"] is None else f"{row['link_gbps']:g} GB/s"
            prefill = ", ".join(f"{n}: {speed:.1f}" for n, speed in row["prefill_tok_s"].items())
            yield (
                f"{title}: {row['policy']}",
                f"{row['decode_tok_s']:.2f} tok/s",
                f"{link}, {row['routing']}; hits {row['hit_rate']:.0%}, share {row['share']:.2f}"
                + (f"; host {row['host_us']:.0f} us a layer" if row["host_us"] else "")
                + (f"; prefill {prefill}" if prefill else ""),
            )
        for ratio in report["ratios"]:
            share = ratio["ratio"] / ratio["allowed"]
            yield f"{ratio['best']} over {ratio['over']}", f"{ratio['ratio']:.2f} x", f"{share:.2f} of what is allowed"
