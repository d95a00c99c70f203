"""Print a text while it is generated, and say how fast that went and what memory it took.

    python examples/streaming.py                                       # the model that ships in the package
    python examples/streaming.py Qwen/Qwen3-30B-A3B

Options are named as on the command line; None, their default, leaves one to the checkpoint.
"""

import sys

import moestro
from moestro.text.generation import generate_text
from moestro.text.options import TextOptions


def main(model: str = "demo") -> None:
    """Continue one prompt by 64 sampled tokens."""
    loaded, tokenizer = moestro.load(model), moestro.load_tokenizer(model)
    prompt = "Once upon a time"
    print(prompt, end="")
    result = generate_text(
        loaded,
        tokenizer,
        prompt,
        TextOptions(max_new_tokens=64, temperature=0.7, seed=3),
        on_text=lambda piece: print(piece, end="", flush=True),
    )
    print(f"\n\nprefill {result.prefill_tok_s:.1f} tok/s, decode {result.decode_tok_s:.1f} tok/s")
    print(f"the first token after {result.ttft_s:.3f} s; {result.peak_bytes['ram'] / 2**20:.0f} MiB of RAM at most")


if __name__ == "__main__":
    main(*sys.argv[1:2])
