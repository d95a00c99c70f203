"""Write a conversation by the tokenizer's chat template, or say in one line why the template cannot.

render(tokenizer, [{"role": "user", "content": "Hello"}])      # "user: Hello\\nassistant: "
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RequestError, first_line
from .channels import REASONING_FIELDS

Message = dict[str, Any]

_ASKED, _PROBE = "How deep is the sea?", "What is the tallest mountain?"  # texts that no template contains
_LISTED = re.compile(r"""['"]type['"]:\s*['"]text['"]""")  # a list of parts that was printed as Python or JSON
_READS_REASONING = re.compile(rf"\b({'|'.join(REASONING_FIELDS)})\b")


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template; without one, a conversation is a plain text."""
    return bool(tokenizer.chat_template)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of a conversation, up to where the next answer begins.

    Messages are given as texts, or in parts where the template reads only those.

    Raises:
        RequestError: the template refuses the messages, fails, or leaves out what the user said.
    """
    reasons: list[str] = []
    for shape in (_in_one, _in_parts):
        try:
            text = _apply(tokenizer, messages, shape)
            if not _LISTED.search(text) and _has_said(tokenizer, messages, len(messages) - 1, text, shape):
                return text
            reasons.append("it leaves out what the user says")
        except Exception as error:  # a template is a program that may raise anything
            reasons.append(_reason(error))
    raise RequestError(
        f"the tokenizer's chat template cannot write this conversation: {reasons[0]}; {_advice(messages)}"
    )


def check_template(tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
    """Refuse a chat that the template cannot write, before a model is loaded.

    Raises:
        RequestError: it cannot write a conversation of two turns, or leaves out the system prompt.
    """
    if not has_template(tokenizer):
        return
    said: list[Message] = [{"role": "user", "content": _ASKED}]
    said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": _ASKED}]
    for turns in (said[:1], said):
        render(tokenizer, turns)
        if system:
            messages = [{"role": "system", "content": system}, *turns]
            text = render(tokenizer, messages)
            if not any(_has_said(tokenizer, messages, 0, text, shape) for shape in (_in_one, _in_parts)):
                raise RequestError("the tokenizer's chat template leaves out the system prompt; do without --system")


def answer_message(tokenizer: PreTrainedTokenizerBase, text: str, reasoning: str | None) -> Message:
    """An answer as a message of the history; with its reasoning only if the template reads that."""
    message: Message = {"role": "assistant", "content": text}
    template = tokenizer.chat_template
    if reasoning and template and _READS_REASONING.search(str(template)):
        message |= dict.fromkeys(REASONING_FIELDS, reasoning)
    return message


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], shape: Callable[[Message], Message]) -> str:
    shaped = [shape(message) for message in messages]
    text: str = tokenizer.apply_chat_template(shaped, add_generation_prompt=True, tokenize=False)
    return text


def _has_said(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    at: int,
    text: str,
    shape: Callable[[Message], Message],
) -> bool:
    """Whether a message is in the text, or would be if it were another one: a template may rewrite a message."""
    if str(messages[at]["content"]).strip() in text:
        return True
    probe = [*messages[:at], messages[at] | {"content": _PROBE}, *messages[at + 1 :]]
    try:
        return _PROBE in _apply(tokenizer, probe, shape)
    except Exception:  # a template is a program that may raise anything
        return False


def _in_one(message: Message) -> Message:
    return message


def _in_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    return first_line(error) if kind in ("TemplateError", "ValueError") else f"{kind}: {first_line(error)}"


def _advice(messages: Sequence[Message]) -> str:
    if messages[0]["role"] == "system":
        return "leave --system out, or mend the template in the tokenizer's folder"
    return "mend the template in the tokenizer's folder, or remove it to talk in plain text"
