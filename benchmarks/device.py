"""Report on one machine in one call of under 10 minutes: card, tests, rates, a run of 5 tokens, policies compared.

Each step is a process of its own with a time limit, so that a step that hangs or dies costs no row but its own. The
report is one JSON file, written anew after each step. Run it in the repository's root; `benchmarks/device.sh` finds the
Python and does that.

    python -m benchmarks.device --toy --out /tmp/results
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from moestro.bench.machine_card import GIB, card_lines, git_commit, machine_card, slug
from moestro.bench.process import GRACE_S, Finished, finish, scrub
from moestro.planning.shapes import REAL_SHAPES, spec_of_shape

from .device_table import report_table
from .rates import FULL_BYTES

TOTAL_LIMIT_S = 560.0  # of the steps together; setting up a Python comes before
TESTS_LIMIT_S = 120.0
RATES_LIMIT_S = 60.0
RUN_LIMIT_S = 200.0

RAM_SHARE = 0.85  # of the available RAM that a shape may take
PROMPT = "Once upon a time"
# Tests of what runs on a device come first. The whole suite would leave no time to measure.
TESTS = ("gpu_kernels", "lanes", "conductor", "hybrid", "capture", "gpu_need", "plug", "experts", "one_token", "dense")
# Shapes whose policies are compared on a GPU: arguments, seconds after loading from which no policy is begun, and the
# step's time limit in seconds. At the paced link only the first prompt is timed.
_MIXTRAL = ("--shape", "mixtral-8x7b", "--gpu-memory", "24GiB", "--prompt", "512", "--prompt", "32", "--prompt", "2048")
HYBRID = (
    (*_MIXTRAL, "--link", "12GB/s", 190.0, 330.0),
    ("--shape", "qwen3-30b-a3b", "--bits", "4", "--gpu-memory", "8GiB", "--prompt", "512", "--no-uniform", 60.0, 110.0),
)
HYBRID_TOY = (
    ("--shape", "tiny", "--gpu-memory", "3MiB", "--prompt", "8", "--decode-tokens", "4", "--no-uniform", 20.0, 90.0),
)
_MEASURING = 0.55  # share of a step's time; the rest is for loading and for the policy that is running at its end
ALL_LAYERS_BYTES, CUT_LAYERS = 96 * 2**30, 24  # free RAM that Mixtral's 32 layers need, and the depth with less
RUN_KEYS = ("text", "prefill_tok_s", "decode_tok_s", "ttft_s", "peak_bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a machine's card, test it, measure it, run the largest shape that fits, and save one JSON file."""
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
    shape = options.shape or ("tiny" if options.toy else None if machine["gpu"] else choose_shape(ram_bytes))
    report["runs"], report["hybrid"] = [], []
    if shape is not None:
        print(f"running {shape} ...", flush=True)
        report["runs"] = [run_shape(shape, limit_s(RUN_LIMIT_S))]
        save()
    for *arguments, stop_s, step_s in HYBRID_TOY if options.toy else HYBRID if machine["gpu"] else ():
        print(f"comparing policies: {' '.join(map(str, arguments))} ...", flush=True)
        device = "cuda" if machine["gpu"] else "emulated"
        report["hybrid"].append(
            run_hybrid([*map(str, arguments), "--device", device], ram_bytes, stop_s, limit_s(step_s))
        )
        save()
    console.print(report_table(report))
    print(f"saved {options.out.name}/{name}")
    return (
        0 if all(step["ok"] for step in (report["tests"], report["rates"], *report["runs"], *report["hybrid"])) else 1
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/device.sh", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to try all steps in under a minute")
    parser.add_argument("--shape", help="shape to run (default: the largest that fits in 0.85 of the RAM)")
    parser.add_argument(
        "--ram-gib", type=float, help="RAM to count on (default: what is available; some machines grow theirs)"
    )
    parser.add_argument("--commit", help="commit to record (default: git's; a copied tree has none)")
    return parser.parse_args(argv)


# ---- steps: each a process with a limit; each returns a row with "ok" ----


def run_tests(toy: bool, limit_s: float) -> dict[str, Any]:
    """Run tests; return their counts, and the names and messages of those that failed, with "ok"."""
    files = [f"tests/test_{name}.py" for name in (("contract",) if toy else TESTS)]
    files = [path for path in files if Path(path).exists()]
    if not files:
        return {"ok": True, "ran": False, "note": "skipped: there are no tests"}
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
        done = finish([*command, f"--junitxml={counts}", *files], limit_s)
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
    return {"passed": passed, "failed": failed + errors, "skipped": skipped, "failures": failures[:20]}


def run_rates(toy: bool, ram_bytes: int, limit_s: float) -> dict[str, Any]:
    """Measure rates; return the fields of `Rates`, with "ok"."""
    size = ["--toy"] if toy else ["--size-bytes", str(min(FULL_BYTES, ram_bytes // 2))]
    done = finish([sys.executable, "-m", "benchmarks.rates", *size], limit_s)
    found = _last_json(done)
    return {"ok": False, **found} if "error" in found else {"ok": True, "wall_s": done.wall_s, **found}


def choose_shape(ram_bytes: int) -> str:
    """The largest shape whose weights fit in 0.85 of the RAM."""
    specs = {name: spec_of_shape(name) for name in (*REAL_SHAPES, "tiny")}
    sizes_bytes = {name: spec.dense_bytes + spec.expert_bytes for name, spec in specs.items()}
    return max((name for name in specs if sizes_bytes[name] <= RAM_SHARE * ram_bytes), key=sizes_bytes.__getitem__)


def run_shape(shape: str, limit_s: float) -> dict[str, Any]:
    """Generate 5 tokens with random weights of a shape; return the figures of `moestro run --json`, with "ok"."""
    arguments = ["run", "--shape", shape, PROMPT, "-n", "5", "--json"]
    done = finish([sys.executable, "-m", "moestro.cli.main", *arguments], limit_s)
    row: dict[str, Any] = {"shape": shape, "ok": False, "wall_s": done.wall_s}
    row["command"] = f'moestro run --shape {shape} "{PROMPT}" -n 5 --json'
    result = _last_json(done)
    if "error" in result:
        return row | result
    if missing := [key for key in RUN_KEYS if key not in result]:
        return row | {"error": f"its JSON lacks {', '.join(missing)}"}
    if odd := [key for key in RUN_KEYS if key.endswith("_s") and not isinstance(result[key], int | float)]:
        return row | {"error": f"its JSON has no number for {', '.join(odd)}"}
    return row | {"ok": True} | {key: result[key] for key in RUN_KEYS}


def run_hybrid(arguments: Sequence[str], ram_bytes: int, stop_s: float, limit_s: float) -> dict[str, Any]:
    """Compare policies on a shape; return the figures of `moestro bench hybrid --json`, with "ok".

    Args:
        stop_s: seconds after loading from which no policy is begun.
        limit_s: the step's time limit in seconds.
    """
    stop_s = min(stop_s, limit_s * _MEASURING)
    arguments = [*arguments, "--limit-s", str(round(stop_s))]
    if "mixtral-8x7b" in arguments and ram_bytes < ALL_LAYERS_BYTES:
        arguments += ["--layers", str(CUT_LAYERS)]
    done = finish([sys.executable, "-m", "moestro.cli.main", "bench", "hybrid", *arguments, "--json"], limit_s)
    row: dict[str, Any] = {"ok": False, "wall_s": done.wall_s, "command": f"moestro bench hybrid {' '.join(arguments)}"}
    found = _last_json(done)
    return row | {"ok": "error" not in found} | found


def _last_json(done: Finished) -> dict[str, Any]:
    """The object in the last line that a step printed, or one whose "error" says why there is none."""
    if done.code != 0 or done.limit_s is not None:
        return {"error": done.last_words()}
    try:
        return dict(json.loads(done.out.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return {"error": "its last line of output is no JSON"}


if __name__ == "__main__":
    raise SystemExit(main())
