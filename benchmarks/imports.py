"""What a start costs: seconds of fresh processes, Moestro's and Transformers' alone in turns, A B A B.

    python -m benchmarks.imports

Two pairs: the import of what loads models, and the load of the demo checkpoint from nothing. In the first, Moestro
checks options without torch, which it imports when a model is loaded; so the second pair is what a user waits for.
Besides, the time in which a wrong option is refused. Prints medians and the median ratio of each pair of turns, and a
line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.resources import files
from statistics import median
from typing import Any

DEMO = str(files("moestro") / "demo")
PAIRS = {  # what: (Moestro's code, Transformers' alone)
    "import": ("import moestro.loading.load", "import torch; from transformers import AutoModelForCausalLM"),
    "load": (
        "import moestro; moestro.load('demo', device='cpu')",
        f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({DEMO!r})",
    ),
}
REFUSED = "import sys; sys.argv = 'moestro run demo x --bits 5'.split(); import moestro.cli.main as m; m.main()"


def seconds(code: str, status: int = 0) -> float:
    """Seconds of a fresh Python that runs some code.

    Raises:
        RuntimeError: it ended with another status.
    """
    start_s = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    took_s = time.perf_counter() - start_s
    if done.returncode != status:
        raise RuntimeError(f"{code} ended with {done.returncode}: {done.stderr}")
    return took_s


def measure(turns: int) -> dict[str, Any]:
    """The figures: medians of the turns, after one that warms up the files' pages."""
    found: dict[str, Any] = {"turns": turns}
    for what, (ours, alone) in PAIRS.items():
        took = [(seconds(ours), seconds(alone)) for _ in range(turns + 1)][1:]
        found[what] = {
            "moestro_s": median(a for a, _ in took),
            "transformers_s": median(b for _, b in took),
            "ratio": median(a / b for a, b in took),
        }
    found["refused_s"] = median(seconds(REFUSED, 2) for _ in range(turns))
    return found


def main() -> None:
    """Parse, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    found = measure(parser.parse_args().turns)
    for what in PAIRS:
        row = found[what]
        print(
            f"{what:7} Moestro {row['moestro_s']:.2f} s, Transformers alone {row['transformers_s']:.2f} s; "
            f"{row['ratio']:.2f} in turns"
        )
    print(f"refused {found['refused_s']:.2f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
