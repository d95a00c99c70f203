"""Continue several prompts at once: a step reads the weights of an expert once for all rows that are sent to it.

    python examples/batch.py                                           # the model that ships in the package
    python examples/batch.py allenai/OLMoE-1B-7B-0924

The model is Transformers' own, so padding, masks and `generate` are as anywhere.
"""

import sys

import moestro

PROMPTS = ("Once upon a time", "The wolf said to the fox that", "In the forest", "There was a poor miller who")


def main(model: str = "demo") -> None:
    """Print a greedy continuation of each prompt."""
    loaded, tokenizer = moestro.load(model), moestro.load_tokenizer(model)
    tokenizer.padding_side = "left"  # so that all prompts end where their answers begin
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True).to(loaded.device)
    found = loaded.generate(**batch, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    for row in tokenizer.batch_decode(found, skip_special_tokens=True):
        print(f"- {row}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
