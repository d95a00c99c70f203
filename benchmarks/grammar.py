"""What a JSON schema costs an answer: compiling it, and each token's mask, by llguidance.

    python -m benchmarks.grammar --rounds 5

The demo's tokenizer, and two with words of noise in its vocabulary, which then has as many tokens as OLMoE's and
Qwen3's. For each a schema is compiled anew, and an answer that follows it is taken, token by token: with the grammar's
mask and without one, in turns. Prints medians, and the share of a step of so many milliseconds that a mask is. Writes
JSON with the machine and the commit to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from random import Random
from statistics import median
from string import ascii_lowercase
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moestro import load_tokenizer
from moestro.bench.machine_card import git_commit, machine_card, slug
from moestro.serve.grammar import GrammarConstraint, Grammars
from moestro.serve.thinking import Thinking

RESULTS = Path(__file__).parent / "results"
VOCABULARIES = {"demo": 0, "olmoe": 50_304, "qwen3": 151_936}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "kind": {"enum": ["king", "queen", "prince", "princess", "miller"]},
        "address": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    "required": ["name", "age", "tags", "kind", "address"],
    "additionalProperties": False,
}
ANSWER = {
    "name": "The youngest of the three sons",
    "age": 17,
    "tags": ["brave", "poor", "kind to animals"],
    "kind": "prince",
    "address": {"city": "the castle behind the seven mountains"},
}


def main() -> None:
    """Parse, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=17.0, help="of a step; OLMoE's shape at 4 bits has some 17")
    given = parser.parse_args()
    torch.set_num_threads(1)  # others would wait for each other where the machine is busy
    rows = {}
    for name, size in VOCABULARIES.items():
        row = measured(size, given.rounds)
        row["share_of_a_step"] = row["mask_us"] / (given.step_ms * 1000)
        rows[name] = row
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    machine = machine_card()
    found = vars(given) | {"rows": rows, "machine": machine, "commit": git_commit()}
    target = RESULTS / f"grammar-{slug(str(machine['cpu']))}-{datetime.date.today().isoformat()}.json"
    target.write_text(json.dumps(found) + "\n")


def measured(size: int, rounds: int) -> dict[str, float]:
    """Milliseconds to compile, and microseconds of a token's mask, of a vocabulary that large."""
    tokenizer = _enlarged(load_tokenizer("demo"), size)
    size = len(tokenizer)
    begin_s = perf_counter()
    grammars = Grammars(tokenizer, size, [tokenizer.eos_token_id])
    grammars.matcher('start: "a"')
    tokenizer_s = perf_counter() - begin_s
    ids = tokenizer(json.dumps(ANSWER), add_special_tokens=False).input_ids
    compiled_s, with_s, without_s = [], [], []
    for at in range(rounds):
        schema = SCHEMA | {"title": str(at)}  # another one, which is not kept yet
        begin_s = perf_counter()
        matcher = grammars.matcher(Thinking().before(), {"answer": schema})
        compiled_s.append(perf_counter() - begin_s)
        with_s.append(_answered(GrammarConstraint(matcher), ids, size))
        without_s.append(_answered(None, ids, size))
    return {
        "tokens": size,
        "tokenizer_ms": 1000 * tokenizer_s,
        "compile_ms": 1000 * median(compiled_s),
        "mask_us": 1e6 * (median(with_s) - median(without_s)) / len(ids),
        "choice_us": 1e6 * median(without_s) / len(ids),
    }


def _enlarged(tokenizer: Any, size: int) -> Any:
    """A tokenizer with words of noise in its vocabulary, that no text becomes."""
    value = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, draw = value["model"]["vocab"], Random(0)
    while len(vocabulary) < size:
        vocabulary.setdefault("".join(draw.choices(ascii_lowercase, k=draw.randint(3, 9))), len(vocabulary))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(value)), eos_token=tokenizer.eos_token
    )


def _answered(constraint: GrammarConstraint | None, ids: list[int], size: int) -> float:
    """Seconds to choose each token of an answer, by the largest logarithm."""
    logits = torch.zeros(len(ids), size)
    logits[torch.arange(len(ids)), torch.tensor(ids)] = 1.0
    begin_s = perf_counter()
    for row, token in zip(logits, ids, strict=True):
        if constraint is not None:
            constraint.mask(row)
        chosen = int(row.argmax())
        if chosen != token:
            raise AssertionError(f"the grammar forbids token {token} of the answer, which follows it")
        if constraint is not None:
            constraint.accept(chosen)
    return perf_counter() - begin_s


if __name__ == "__main__":
    main()
