"""What a benchmark of a shape cannot do with it, said by the options that ask for it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError
from ..planning.shapes import shape_named
from ..planning.text_shape import context_of


def check_prompts(shape: str, prompts: Sequence[int], decode_tokens: int) -> None:
    """Refuse prompts that a shape's context does not hold together with what is decoded after them.

    Raises:
        RequestError: a line with the longest prompt, and with one that would do.
    """
    context, longest = context_of(shape_named(shape)), max(prompts)
    if context is None or longest + decode_tokens <= context:
        return
    room = context - decode_tokens
    remedy = f"--prompt {room} would do" if room >= 1 else f"--decode-tokens of less than {context} would do"
    raise RequestError(
        f"--prompt {longest} and --decode-tokens {decode_tokens} are {longest + decode_tokens} tokens, and the context "
        f"of {shape} is {context}; {remedy}"
    )
