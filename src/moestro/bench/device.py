"""One report of one machine, in one call of under 10 minutes: card, tests, rates, and a run of 5 tokens.

It measures nothing itself: each step is a process of its own with a time limit, so that a step that hangs
or dies costs its own row and no other. The report is one JSON file, rewritten after each step. Run it in
the repository's root; `benchmarks/device.sh` finds the Python and does that.

    python -m moestro.bench.device --toy --out /tmp/results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console
from rich.table import Table

from ..compute.cpu import core_cpus
from ..machine import available_ram_bytes, cpu_model, total_ram_bytes
from .rates import FULL_BYTES, GIB, Rates

TOTAL_LIMIT_S = 560.0  # of the steps together; setting up a Python comes before
TESTS_LIMIT_S = 240.0
RATES_LIMIT_S = 110.0
RUN_LIMIT_S = 200.0
QUERY_LIMIT_S = 20.0
GRACE_S = 8.0  # between asking a late step to stop and ending it

# Bytes of all weights in bfloat16, largest first (mixtral-8x7b: 90.2e9 of them in experts).
SHAPE_BYTES = {"mixtral-8x7b": 93.4e9, "qwen3-30b-a3b": 61e9, "olmoe-1b-7b": 13.8e9, "tiny": 0.0}
RAM_SHARE = 0.85  # of the available RAM that a shape may take
PROMPT = "Once upon a time"
RUN_KEYS = ("text", "prefill_tok_s", "decode_tok_s", "ttft_s", "peak_bytes")

Row = tuple[str, str, str]  # what, value, note


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a machine's card, tests it, measures it, runs the largest shape that fits, saves one JSON."""
    options = _parse(argv)
    deadline_s = time.monotonic() + TOTAL_LIMIT_S

    def limit_s(step_s: float) -> float:
        return max(1.0, min(step_s, deadline_s - GRACE_S - time.monotonic()))

    now = datetime.now(UTC)
    report: dict[str, Any] = {"kind": "device", "time": now.isoformat(timespec="seconds"), "toy": options.toy}
    report["commit"] = options.commit or git_commit()
    report["machine"] = machine = machine_card()
    name = f"device-{slug(machine['gpu'] or machine['cpu'])}-{now.date()}{'-toy' if options.toy else ''}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / name

    def save() -> None:
        path.write_text(json.dumps(report, indent=1) + "\n")

    console = Console(width=None if sys.stdout.isatty() else 110)
    for label, text in card_lines(machine, report["commit"]):
        print(f"{label:13} {text}", flush=True)
    ram_bytes = int(options.ram_gib * GIB) if options.ram_gib else machine["ram_available_bytes"]
    print("testing ...", flush=True)
    report["tests"] = run_tests(options.toy, limit_s(TESTS_LIMIT_S))
    save()
    print("measuring rates ...", flush=True)
    report["rates"] = run_rates(options.toy, ram_bytes, limit_s(RATES_LIMIT_S))
    save()
    shape = options.shape or ("tiny" if options.toy else choose_shape(ram_bytes))
    print(f"running {shape} ...", flush=True)
    report["runs"] = [run_shape(shape, limit_s(RUN_LIMIT_S))]
    save()
    console.print(report_table(report))
    print(f"saved {options.out.name}/{name}")
    return 0 if all(step["ok"] for step in (report["tests"], report["rates"], *report["runs"])) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/device.sh", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to try all steps in under a minute")
    parser.add_argument("--shape", help="shape to run (default: the largest that fits in 0.85 of the RAM)")
    parser.add_argument(
        "--ram-gib",
        type=float,
        help="RAM to count on (default: what is available; some machines grow theirs)",
    )
    parser.add_argument("--commit", help="commit to record (default: git's; a copied tree has none)")
    return parser.parse_args(argv)


# ---- steps: each a process with a limit; each returns a row with "ok" ----


@dataclass(frozen=True, slots=True)
class Finished:
    """How a process ended. `limit_s` is set when it was stopped for being late."""

    code: int
    out: str
    err: str
    wall_s: float
    limit_s: float | None = None

    def last_words(self) -> str:
        """Why it failed: its limit, or the last line with words in it, without this machine's paths."""
        lines = [line.strip(" │╭╮╰╯─!=") for line in (self.err.strip() or self.out).splitlines()]
        spoken = [scrub(line)[:300] for line in lines if re.search(r"\w", line)]
        if self.limit_s is not None:
            return f"stopped at its limit of {self.limit_s:.0f} s" + (f"; last: {spoken[-1]}" if spoken else "")
        return spoken[-1] if spoken else f"exit status {self.code} without a word"


def finish(argv: Sequence[str], limit_s: float) -> Finished:
    """Runs a command to its end or its limit; there it is interrupted, and killed if it stays."""
    start_s = time.monotonic()
    late = False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # Files, not pipes: a grandchild that holds a pipe open would keep us waiting for its end.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True, start_new_session=True
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGINT)  # pytest then still writes its counts
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            with suppress(ProcessLookupError):  # the whole group, children left behind too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        wall_s = round(time.monotonic() - start_s, 1)
        return Finished(process.returncode, out.read(), err.read(), wall_s, limit_s if late else None)


def run_tests(toy: bool, limit_s: float) -> dict[str, Any]:
    """The suite's counts, and the names and messages of what failed."""
    target = Path("tests/test_contract.py" if toy else "tests")
    if not target.exists():
        return {"ok": True, "ran": False, "note": f"skipped: there is no {target}"}
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
        done = finish([*command, f"--junitxml={counts}", str(target)], limit_s)
        found = _read_counts(counts) if counts.exists() else {}
    ok = done.code == 0 and done.limit_s is None
    if not ok:
        print(*done.out.splitlines()[-60:], sep="\n", flush=True)
        found["error"] = done.last_words()
    return {"ok": ok, "ran": True, "wall_s": done.wall_s, **found}


def _read_counts(path: Path) -> dict[str, Any]:
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {scrub(problem.get('message', ''))[:200]}"
        for suite in suites
        for case in suite.iter("testcase")
        for problem in (*case.iter("failure"), *case.iter("error"))
    ]
    passed = total - failed - errors - skipped
    return {
        "passed": passed,
        "failed": failed + errors,
        "skipped": skipped,
        "failures": failures[:20],
    }


def run_rates(toy: bool, ram_bytes: int, limit_s: float) -> dict[str, Any]:
    """The fields of `Rates`, with "ok"."""
    size = ["--toy"] if toy else ["--size-bytes", str(min(FULL_BYTES, ram_bytes // 2))]
    done = finish([sys.executable, "-m", "moestro.bench.rates", *size], limit_s)
    if done.code != 0 or done.limit_s is not None:
        return {"ok": False, "error": done.last_words()}
    return {"ok": True, "wall_s": done.wall_s, **asdict(Rates.from_json(done.out.splitlines()[-1]))}


def choose_shape(ram_bytes: int) -> str:
    """The largest shape whose weights fit in 0.85 of the RAM."""
    return next(name for name, size in SHAPE_BYTES.items() if size <= RAM_SHARE * ram_bytes)


def run_shape(shape: str, limit_s: float) -> dict[str, Any]:
    """Generates 5 tokens with random weights of a shape; what `moestro run --json` says of it."""
    arguments = ["run", "--shape", shape, PROMPT, "-n", "5", "--json"]
    done = finish([sys.executable, "-m", "moestro.cli", *arguments], limit_s)
    row: dict[str, Any] = {"shape": shape, "ok": False, "wall_s": done.wall_s}
    row["command"] = f'moestro run --shape {shape} "{PROMPT}" -n 5 --json'
    if done.code != 0 or done.limit_s is not None:
        return row | {"error": done.last_words()}
    try:
        result: Any = json.loads(done.out.strip().splitlines()[-1])
        missing = [key for key in RUN_KEYS if key not in result]
    except (IndexError, ValueError, TypeError):
        return row | {"error": "its last line of output is no JSON"}
    if missing:
        return row | {"error": f"its JSON lacks {', '.join(missing)}"}
    odd = [key for key in RUN_KEYS if key.endswith("_s") and not isinstance(result[key], int | float)]
    if odd:
        return row | {"error": f"its JSON has no number for {', '.join(odd)}"}
    return row | {"ok": True} | {key: result[key] for key in RUN_KEYS}


# ---- the machine ----


def machine_card() -> dict[str, Any]:
    """What stands still: hardware and versions. None where there is no such thing here."""
    card: dict[str, Any] = {
        "cpu": cpu_model(),
        "physical_cores": len(core_cpus()),
        "logical_cpus": len(os.sched_getaffinity(0)),
        "ram_bytes": total_ram_bytes(),
        "ram_available_bytes": available_ram_bytes(),
        "gpu": None,
        "gpu_memory_bytes": None,
        "driver": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
    }
    if torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(0)
        card |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "driver": _driver()}
    return card


def card_lines(machine: dict[str, Any], commit: str | None) -> Iterator[tuple[str, str]]:
    yield "CPU", f"{machine['cpu']}, {machine['physical_cores']} cores ({machine['logical_cpus']} logical)"
    yield "RAM", f"{machine['ram_bytes'] / GIB:.1f} GiB, {machine['ram_available_bytes'] / GIB:.1f} available"
    if machine["gpu"]:
        gpu = f"{machine['gpu']}, {machine['gpu_memory_bytes'] / GIB:.1f} GiB"
        yield "GPU", f"{gpu}, driver {machine['driver'] or 'unknown: nvidia-smi did not say'}"
    else:
        yield "GPU", "no CUDA device"
    names = ("python", "torch", "transformers", "triton")
    yield "versions", ", ".join(f"{name} {machine[name] or 'not installed'}" for name in names)
    yield "commit", commit or "unknown: no git checkout with a commit here"


def git_commit() -> str | None:
    """The commit, with "-dirty" when files differ from it; None outside a checkout."""
    with suppress(FileNotFoundError):  # no git here
        head = finish(["git", "rev-parse", "--verify", "HEAD"], QUERY_LIMIT_S)
        if head.code == 0:
            changes = finish(["git", "status", "--porcelain", "--untracked-files=no"], QUERY_LIMIT_S)
            return head.out.strip() + ("-dirty" if changes.out.strip() or changes.code else "")
    return None


def _driver() -> str | None:
    with suppress(FileNotFoundError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = finish(query, QUERY_LIMIT_S)
        if done.code == 0 and done.out.strip():
            return done.out.splitlines()[0].strip()
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """A device's name for a file: "Intel(R) Xeon(R) CPU @ 2.00GHz" becomes "intel-xeon"."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def scrub(text: str) -> str:
    """Text without the paths of this machine, so that a report can be shared."""
    for path, name in ((sys.executable, "python"), (str(Path.cwd()), "."), (sys.prefix, "venv")):
        text = text.replace(path, name)
    return text.replace(str(Path.home()), "~")


# ---- the table ----

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
    """Tests, rates and runs of a report, one line each."""
    title = f"{report['machine']['gpu'] or report['machine']['cpu']}{', toy sizes' if report['toy'] else ''}"
    table = Table(title=title)
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for rows in ([_test_row(report["tests"])], _rate_rows(report["rates"]), _run_rows(report["runs"])):
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
        yield (
            f"run {run['shape']}: prefill / decode",
            speeds,
            f"first token {run['ttft_s']:.2f} s; peak {peak}",
        )


if __name__ == "__main__":
    raise SystemExit(main())
