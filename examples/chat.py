"""Hold a conversation: each turn computes its new tokens alone, since the KV cache of the turns before is kept.

    python examples/chat.py                                            # the model that ships in the package
    python examples/chat.py mistralai/Mixtral-8x7B-Instruct-v0.1

A model with a chat template answers in it; one without continues the conversation as a text, as the demo does.
"""

import sys

import moestro
from moestro.text.chat import ChatSession
from moestro.text.options import TextOptions

TURNS = ("Once upon a time there was a king who had three daughters.", "The youngest was as wise as an owl.")


def main(model: str = "demo") -> None:
    """Say two things and print the answers as they come."""
    loaded, tokenizer = moestro.load(model), moestro.load_tokenizer(model)
    session = ChatSession(loaded, tokenizer, TextOptions(max_new_tokens=48, temperature=0.0))
    for turn in TURNS:
        print(f"> {turn}")
        answer = session.ask(turn, on_text=lambda piece: print(piece, end="", flush=True))
        print(f"\n  {answer.new_tokens} tokens, {answer.decode_tok_s:.1f} tok/s\n")


if __name__ == "__main__":
    main(*sys.argv[1:2])
