"""The tokens of a conversation, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .generation import encode
from .templates import has_template, render


def prompt_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    template_values: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation."""
    if not has_template(tokenizer):
        joints = ["" if i == 0 or m["role"] == "assistant" else "\n" for i, m in enumerate(messages)]
        text = "".join(joint + message["content"] for joint, message in zip(joints, messages, strict=True))
        return list(map(int, encode(tokenizer, text)))
    return list(map(int, encode(tokenizer, render(tokenizer, list(messages)), add_special_tokens=False)))


def template_reads(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template reads a variable."""
    return name in str(tokenizer.chat_template)


def forced_call(responses: Any, tools: Sequence[Any], name: str | None) -> str | None:
    """A grammar."""
    return None
