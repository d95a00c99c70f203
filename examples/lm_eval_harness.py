"""Evaluate a model that Moestro runs with EleutherAI's lm_eval, whose HFLM takes a loaded Transformers model as it is.

    pip install lm_eval
    python examples/lm_eval_harness.py mistralai/Mixtral-8x7B-v0.1 --dense-bits 4 --expert-bits 2 --tasks wikitext,c4
    python examples/lm_eval_harness.py mistralai/Mixtral-8x7B-v0.1 --expert-bits 3 --tasks mmlu --fewshot 5
    python examples/lm_eval_harness.py demo --text src/moestro/demo/heldout.txt --window 256

Tasks that lm_eval has by name fetch their data from the Hugging Face hub; a text of your own needs no network.
lm_eval's perplexities are those of a word and of a byte, which do not depend on the tokenizer.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

import moestro


def text_task(path: Path) -> dict[str, Any]:
    """The task of predicting a text, a single document in UTF-8, as lm_eval takes it."""
    aggregations = dict.fromkeys(("word_perplexity", "byte_perplexity"), "weighted_perplexity")
    aggregations["bits_per_byte"] = "bits_per_byte"
    return {
        "task": path.stem,
        "dataset_path": "text",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "sample_by": "document"},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False} for name, how in aggregations.items()
        ],
    }


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: list[Any],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    window: int | None = None,
) -> dict[str, dict[str, float]]:
    """What lm_eval finds of a loaded model: task -> metric -> value.

    Args:
        tasks: names, or dictionaries like that of `text_task`.
        limit: documents of each task; None for all.
        fewshot: examples that are shown before each question; None for the task's own number.
        window: the most tokens that the model is given at once; None for its context.
    """
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=window)
    found = simple_evaluate(harness, tasks=tasks, limit=limit, num_fewshot=fewshot, bootstrap_iters=0)
    return {
        task: {name.removesuffix(",none"): value for name, value in values.items() if isinstance(value, float)}
        for task, values in found["results"].items()
    }


def main() -> None:
    """Load, evaluate, print a line for each metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a checkpoint's folder, a hub id, or demo")
    parser.add_argument("--tasks", default="", help="names of lm_eval's tasks, with commas between them")
    parser.add_argument("--text", type=Path, help="a text to predict")
    parser.add_argument("--limit", type=int, help="only so many documents of each task")
    parser.add_argument("--fewshot", type=int, help="examples that are shown before each question")
    parser.add_argument("--window", type=int, help="the most tokens that the model is given at once")
    parser.add_argument("--expert-bits", type=int, help="bits of the experts' weights")
    parser.add_argument("--dense-bits", type=int, help="bits of attention and shared experts")
    parser.add_argument("--head-bits", type=int, default=16, help="bits of output head and embedding")
    given = parser.parse_args()
    tasks = [name for name in given.tasks.split(",") if name]
    if given.text is not None:
        if not given.text.is_file():
            parser.error(f"--text {given.text}: no such file")
        tasks.append(text_task(given.text))
    if not tasks:
        parser.error("give --tasks, --text, or both")
    bits = {"expert_bits": given.expert_bits, "dense_bits": given.dense_bits, "head_bits": given.head_bits}
    try:
        model = moestro.load(given.model, device="cpu", **bits)
        tokenizer = moestro.load_tokenizer(given.model)
    except moestro.MoestroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    how = {"limit": given.limit, "fewshot": given.fewshot, "window": given.window}
    for task, values in evaluate(model, tokenizer, tasks, **how).items():
        for name, value in values.items():
            print(f"{task}  {name}  {value:.4f}")


if __name__ == "__main__":
    main()
