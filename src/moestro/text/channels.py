"""Tell what a model thinks aloud apart from its answer.

The marks come from the tokenizer's own response template, from Harmony's channels (gpt-oss), or are a pair like <think>
and </think> that the vocabulary or the chat template has. Transformers' `ResponseParser` does the parsing.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from ..errors import CheckpointError, first_line
from .stream import decode

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # names of it in response and chat templates

_WORD = r"(?:think|thinking|thought|reasoning)"
# <think> and </think>, [THINK], <seed:think>, <|thought|>; the groups are what is around the slash.
_SLASHED = re.compile(rf"([<\[◁]\|?)/?((?:(?!begin|start|end)\w+[:_])?{_WORD}\|?[>\]▷])", re.IGNORECASE)
# <|START_THINKING|> and <|END_THINKING|>, <|begin_of_thought|>, <|think_start|>; the groups leave out the verb.
_SPOKEN = re.compile(rf"(<\|?)(?:begin|start|end)(_(?:of_)?{_WORD}\|?>)", re.IGNORECASE)
_SPOKEN_LAST = re.compile(rf"(<\|?{_WORD}_)(?:begin|start|end)(\|?>)", re.IGNORECASE)
_GEMMA = ("<|channel>thought\n", "<channel|>")
_NEVER = r"(?!)"
_HARMONY = {
    "start_anchor_pattern": _NEVER,
    "fields": {
        "reasoning_content": {
            "open_pattern": r"(?:<\|start\|>assistant[^<]*)?<\|channel\|>\s*(?:analysis|commentary)[^<]*"
            r"(?:<\|constrain\|>[^<]*)?<\|message\|>",
            "close_pattern": r"<\|end\|>|<\|call\|>|<\|return\|>|(?=<\|start\|>)",
            "repeats": True,
        },
        "content": {
            "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>final\s*(?:<\|constrain\|>[^<]*)?)?<\|message\|>"
            r"|<\|start\|>assistant(?:final)?(?!<)|(?:<\|start\|>assistant)?<\|channel\|>final(?![\s<])",  # cut short
            "close_pattern": r"<\|end\|>|<\|call\|>|<\|return\|>",
            "repeats": True,
        },
        "unmarked": {},
    },
}


class Channel(Enum):
    """What a piece of text belongs to."""

    REASONING = "reasoning"
    ANSWER = "answer"


@dataclass(frozen=True)
class Channels:
    """How a tokenizer's family marks reasoning and answer.

    tokens: the special tokens that are such marks or parts of them, by id. marks: the pairs that the template was made
    of; empty where the template is the tokenizer's own.
    """

    template: Any  # Transformers' ResponseTemplate
    tokens: dict[int, str]
    tokenizer: PreTrainedTokenizerBase
    marks: tuple[tuple[str, str], ...] = ()
    is_harmony: bool = False
    own: Any = None  # the tokenizer's own template, unchanged

    def opening(self, prompt: Sequence[int]) -> str:
        """The end of a prompt that belongs to the answer already, such as a <think> from the chat template.

        Args:
            prompt: token ids.
        """
        text = decode(self.tokenizer, prompt, skip_special_tokens=False)
        if self.is_harmony:
            last = text[text.rfind("<|start|>") :] if "<|start|>" in text else ""
            return last if last.startswith("<|start|>assistant") and "<|end|>" not in last else ""
        if self.marks:
            return next((mark for mark, _ in self.marks if text.rstrip().endswith(mark.rstrip())), "")
        return text


def find_channels(tokenizer: PreTrainedTokenizerBase) -> Channels | None:
    """The channels of a tokenizer's family; None where it has none.

    Raises:
        CheckpointError: the tokenizer's own response template is none that Transformers can read.
    """
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        try:
            read = load_response_template(own)
            template = _as_text(read)
        except Exception as error:  # it may hold anything
            raise CheckpointError(
                f"the tokenizer's response_template is not usable ({first_line(error)}); "
                "mend it or remove it in tokenizer_config.json"
            ) from error
        tokens = special_tokens(tokenizer, json.dumps(own, ensure_ascii=False))
        return Channels(template, tokens, tokenizer, own=read)
    if all(_has_token(tokenizer, mark) for mark in ("<|channel|>", "<|message|>")):
        tokens = special_tokens(tokenizer, json.dumps(_HARMONY))
        return Channels(load_response_template(_HARMONY), tokens, tokenizer, is_harmony=True)
    marks = _think_marks(tokenizer)
    if not marks:
        return None
    fields = {
        "reasoning_content": {"open": [mark for mark, _ in marks], "close": [mark for _, mark in marks]},
        "content": {},
    }
    template = load_response_template({"start_anchor_pattern": _NEVER, "fields": fields})
    return Channels(template, special_tokens(tokenizer, "".join(map("".join, marks))), tokenizer, marks)


def _as_text(template: Any) -> Any:
    """A response template that only tells regions apart and keeps their content, such as a tool call, as text."""
    plain = {"content": "text", "content_args": {}, "repeats": True, "join": None, "optional": True, "transform": None}
    fields = {name: replace(field, transform_each=False, **plain) for name, field in template.fields.items()}
    return replace(template, fields=fields, defaults={})


def without_field(channels: Channels, name: str) -> Channels:
    """The channels without a field of their template, whose text then belongs to what is around it."""
    fields = {key: field for key, field in channels.template.fields.items() if key != name}
    return replace(channels, template=replace(channels.template, fields=fields))


class Splitter:
    """Splits an answer's text into channels, piece by piece.

    White space around the reasoning, and between it and the answer, is dropped. An answer without marks is not changed.

    Args:
        channels: the marks.
        opening: the end of the prompt that belongs to the answer already.
    """

    def __init__(self, channels: Channels, opening: str) -> None:
        self._tokens = sorted(channels.tokens.values(), key=len, reverse=True)
        self._implicit = channels.template.implicit
        self._channel = Channel.ANSWER
        self._space = ""  # white space that is passed on if text follows in the same region
        self._joint = ""  # what separates two regions of one channel
        self._is_marked = False  # whether a mark has opened a region
        self._said = {Channel.REASONING: False, Channel.ANSWER: False}
        self._unclaimed = ""  # text before any region, since a template may have none for the beginning of an answer
        self._is_claimed = False
        self.has_reasoned = False
        self._is_inside = False  # whether the text is between two marks
        self._parser = ResponseParser(channels.template, prefix=opening)
        is_open = self._enter_by(self._parser.initial_events)
        self.has_reasoned = is_open and self._channel is Channel.REASONING

    def feed(self, text: str) -> list[tuple[Channel, str]]:
        """Take a piece of text; return the pieces that became final with it."""
        pieces = list(self._split(self._parser.feed(text)))
        self._unclaimed = "" if self._is_claimed else self._unclaimed + text
        return pieces

    def end(self) -> list[tuple[Channel, str]]:
        """Return the remaining pieces, at the end of the answer."""
        pieces = list(self._split(self._parser.finalize()[1]))
        if not self._is_claimed:  # no region had the text, which would be lost otherwise
            return [(Channel.ANSWER, self._without_marks(self._unclaimed))] if self._unclaimed else []
        if self._space and not self._is_marked:
            pieces.append((self._channel, self._space))
        return pieces

    def would_hold(self, text: str) -> bool:
        """Whether a text that comes next stands between two marks, such as in what is thought."""
        if not self._is_inside:
            return False
        tried = copy.deepcopy(self)  # a mark may be there whose end is certain only with the next letter
        tried.feed(text)
        return tried._is_inside

    def _without_marks(self, text: str) -> str:
        """The text without special tokens that stand where they mark nothing."""
        for token in self._tokens:
            text = text.replace(token, "")
        return text

    def _enter_by(self, events: Sequence[dict[str, Any]]) -> bool:
        """Enter the region that a prompt leaves open; returns whether there is one."""
        for event in events:
            self._move(event)
        return bool(events) and events[-1]["type"] != "region_close"

    def _split(self, events: Iterable[dict[str, Any]]) -> Iterator[tuple[Channel, str]]:
        for event in events:
            self._move(event)
            if event["type"] == "region_chunk" and event["field"] != "role":
                piece = self._spaced(self._without_marks(event["text"]))
                if piece:
                    yield self._channel, piece

    def _move(self, event: dict[str, Any]) -> None:
        if event["type"] == "region_open":
            self._enter(event["field"])
        if event["type"] != "region_chunk":
            self._is_inside = event["type"] == "region_open" and event["field"] != self._implicit

    def _enter(self, field: str) -> None:
        self._channel = Channel.REASONING if field in REASONING_FIELDS else Channel.ANSWER
        self.has_reasoned |= self._channel is Channel.REASONING
        self._is_marked |= field != self._implicit
        self._is_claimed = True
        self._space, self._joint = "", "\n" if self._said[self._channel] else ""

    def _spaced(self, text: str) -> str:
        """The text without white space at the ends of its region; white space at its end waits for more text."""
        text = self._space + text
        body = text.rstrip()
        if not body:
            self._space = text
            return ""
        self._space = text[len(body) :]
        if self._is_marked:
            if not self._said[self._channel] or self._joint:
                body = body.lstrip()
            body, self._joint = self._joint + body, ""
        self._said[self._channel] = True
        return body


def _has_token(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    index = tokenizer.convert_tokens_to_ids(token)
    return isinstance(index, int) and tokenizer.convert_ids_to_tokens(index) == token


def special_tokens(tokenizer: PreTrainedTokenizerBase, patterns: str) -> dict[int, str]:
    """The special tokens that patterns name: id -> token."""
    plain = patterns.replace("\\", "")
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    special |= {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {index: token for index, token in special.items() if token in plain}


def _think_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, str], ...]:
    """Pairs like <think> and </think> of which the vocabulary or the chat template has at least one mark."""
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template]
    seen = "\n".join([*(text for text in texts if isinstance(text, str)), *tokenizer.get_added_vocab()])
    pairs = {(f"{a}{b}", f"{a}/{b}"): None for a, b in _SLASHED.findall(seen)}
    for pattern in (_SPOKEN, _SPOKEN_LAST):
        for a, b in pattern.findall(seen):
            begins = ("BEGIN", "START") if b.isupper() or a.isupper() else ("begin", "start")
            end = "END" if begins[0].isupper() else "end"
            pairs |= {(f"{a}{begin}{b}", f"{a}{end}{b}"): None for begin in begins if f"{a}{begin}{b}" in seen}
    if any(mark.strip() in seen for mark in _GEMMA):
        pairs[_GEMMA] = None
    if _has_token(tokenizer, "<think>"):
        pairs[("<think>", "</think>")] = None
    # An opening mark whose counterpart appears nowhere marks something else.
    vocabulary = tokenizer.get_added_vocab()
    return tuple(pair for pair in pairs if pair[0].strip() not in vocabulary or pair[1].strip() in seen)
