"""The text and bytes of single tokens, and their logarithms as OpenAI's APIs tell them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .requests import TokenLogprobs
from .service import Ready

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes that a token stands for: UTF-8, perhaps a part of a character."""
    from ..text.stream import decode

    text = decode(tokenizer, [token], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text.encode("utf-8", "replace")
    name = str(tokenizer.convert_ids_to_tokens(token))
    if (byte := _BYTE.fullmatch(name)) is not None:
        return bytes([int(byte[1], 16)])
    table = _byte_level()
    if name and all(one in table for one in name):
        return bytes(table[one] for one in name)
    return text.encode("utf-8", "replace")


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """The characters that GPT-2's vocabulary, and all that follow it, write bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


def content_logprobs(ready: Ready, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Logarithms of tokens as the chat API has them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = token_bytes(ready.tokenizer, token)
        # JSON has no infinity: OpenAI's word for a token of no probability is -9999.
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(piece)}

    return [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in logprobs
    ]


def text_logprobs(ready: Ready, logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    """Logarithms of tokens as the API of plain completions has them; texts are counted from `offset` characters on."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in logprobs:
        text = token_bytes(ready.tokenizer, one.token).decode("utf-8", "replace")
        top = {token_bytes(ready.tokenizer, token).decode("utf-8", "replace"): value for token, value in one.top}
        found["tokens"].append(text)
        found["token_logprobs"].append(max(one.logprob, -9999.0))
        found["top_logprobs"].append({name: max(value, -9999.0) for name, value in top.items()})
        found["text_offset"].append(offset)
        offset += len(text)
    return found
