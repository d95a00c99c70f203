"""An answer's text told apart as it comes: what the model thinks aloud, what it says, which tools it calls.

reader = ResponseReader(find_responses(tokenizer), prompt_ids, tools)
for piece in pieces:
    parts = reader.feed(piece)
parts = reader.end()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex
from transformers import PreTrainedTokenizerBase

from .call_formats import find_format
from .calls import Format, MalformedError, schemas
from .channels import Channel, Channels, Splitter, find_channels, special_tokens, without_field

_LONG = 1000  # characters of a call from which on it is read only where a piece may end it
_CLOSING = frozenset("}]>)|")
Kind = Literal["reasoning", "content", "tool_call"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer. text: of a tool call, its arguments as JSON. name: of the tool that is called."""

    kind: Kind
    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Responses:
    """How a family marks the parts of an answer.

    channels: marks of what is thought; None where it has none. calls: the form of tool calls; None where it has none.
    marks: special tokens whose text must stay in the answer, by id.
    """

    tokenizer: PreTrainedTokenizerBase
    channels: Channels | None
    calls: Format | None
    marks: dict[int, str]

    @property
    def can_call(self) -> bool:
        """Whether calls of tools can be told apart."""
        return self.calls is not None


def find_responses(tokenizer: PreTrainedTokenizerBase) -> Responses | None:
    """How a tokenizer's family marks the parts of an answer; None where it does not.

    Raises:
        CheckpointError: the tokenizer's own response template is none that Transformers can read.
    """
    channels = find_channels(tokenizer)
    is_harmony = channels is not None and channels.is_harmony
    calls = find_format(tokenizer, None if channels is None else channels.own, is_harmony)
    if channels is None and calls is None:
        return None
    marks = {} if channels is None else dict(channels.tokens)
    if calls is not None:
        fixed = [calls.open, *calls.tokens, *(calls.section or ())]
        marks |= special_tokens(tokenizer, "\n".join([*fixed, *(getattr(calls, "close", ""),)]))
    return Responses(tokenizer, channels, calls, marks)


class ResponseReader:
    """Tells one answer apart, in whatever pieces it comes.

    A call is told where its end is there. What begins like a call and is none stays text. Without tools, nothing is a
    call.

    Args:
        formats: of the tokenizer's family, or None, by which all is one text.
        prompt: token ids that the answer continues.
        tools: that may be called, as OpenAI's chat has them.
    """

    def __init__(self, formats: Responses | None, prompt: Sequence[int], tools: Sequence[Any] = ()) -> None:
        self._channels = None if formats is None else formats.channels
        calls = formats.calls if formats is not None and tools else None
        if self._channels is not None and self._channels.own is not None and calls is not None:
            self._channels = without_field(self._channels, "tool_calls")
        opening = "" if self._channels is None else self._channels.opening(list(prompt))
        self._splitter = None if self._channels is None else Splitter(self._channels, opening)
        self._calls = calls
        self._tools = schemas(tools)
        self._marks = None if self._calls is None else _pattern(self._calls)
        self.is_reasoning = self._splitter is not None and self._splitter.has_reasoned
        self._pending = ""  # text that is not decided yet: it may be the beginning of a mark, or a call
        self._opened: Any = None  # the mark of the call that is open
        self._section = ""  # the mark before several calls, until the first one is there
        self._in_section = self._is_used = False  # whether a section is open; whether it has a call
        self._space = ""  # white space that is passed on if text follows
        self._has_said = self._has_called = False  # since the beginning or the last call; whether there was one

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[Part]:
        """Take a piece of text; return the parts that became final with it. The tokens are not needed for it."""
        if self._calls is None:
            return self._text(text)
        self._pending += text
        if self._opened is not None and len(self._pending) > _LONG and not _CLOSING.intersection(text):
            return []  # reading a long call again with each piece would take the square of its length
        return _joined(self._scan(is_end=False))

    def end(self) -> list[Part]:
        """The rest, at the end of the answer."""
        found = list(self._scan(is_end=True)) if self._calls is not None else []
        if self._section:
            found += self._said(self._take_section())
        found += self._rest()
        if self._space and not self._has_called:
            found.append(Part("content", self._space))
        return _joined(found)

    def _scan(self, *, is_end: bool) -> Iterable[Part]:
        while True:
            if self._opened is not None:
                found = self._call(is_end)
                if found is None:
                    return
                yield from found
                continue
            mark = self._marks.search(self._pending, partial=not is_end) if self._marks is not None else None
            before = self._pending if mark is None else self._pending[: mark.start()]
            yield from self._said(before)
            self._pending = self._pending[len(before) :]
            if mark is None or mark.partial or (not is_end and _may_grow(self._calls, mark, len(self._pending))):
                return
            self._pending = self._pending[len(mark.group()) :]
            yield from self._enter(mark)

    def _enter(self, mark: Any) -> Iterable[Part]:
        """Go on after a mark: in a call, in a section, or in the text, where it marks nothing."""
        assert self._calls is not None
        section, text = self._calls.section, mark.group()
        is_inside = self._splitter is not None and self._splitter.would_hold(text)
        if is_inside or (self._calls.is_bare and self._has_said):
            return self._said(text)
        if section is not None and text == section[0]:
            before = self._take_section()
            found = self._text(before) if before else []
            self._section, self._in_section, self._is_used = text, True, False
            return found
        if section is not None and text == section[1]:
            is_used, self._in_section, self._is_used = self._is_used, False, False
            return [] if is_used else self._said(self._take_section() + text)
        if section is not None and not self._in_section:
            return self._said(text)
        self._opened = mark
        return []

    def _call(self, is_end: bool) -> list[Part] | None:
        """What the open call became: parts; None where more must come."""
        assert self._calls is not None
        mark = self._opened.group()
        body = mark + self._pending if self._calls.is_bare else self._pending
        try:
            found = self._calls.read(self._opened, body, self._tools, is_end)
            if found is None and not is_end:
                return None
        except MalformedError:
            found = None
        self._opened = None
        if found is None:
            return self._said(self._take_section() + mark)
        calls, length = found
        self._section, self._is_used = "", True
        self._pending = body[length:]
        parts = self._rest()
        if self._channels is not None:
            self._splitter = Splitter(self._channels, "")
        self._space, self._has_said, self._has_called, self.is_reasoning = "", False, True, False
        return [*parts, *(Part("tool_call", call.arguments, call.name) for call in calls)]

    def _take_section(self) -> str:
        section, self._section = self._section, ""
        return section

    def _said(self, text: str) -> list[Part]:
        """Text that is no call; text in a section that has no call yet comes after its mark."""
        if self._section:
            self._section += text
            if not text.strip():
                return []
            text = self._take_section()
        return self._text(text) if text else []

    def _text(self, text: str) -> list[Part]:
        return self._spaced([(Channel.ANSWER, text)] if self._splitter is None else self._splitter.feed(text))

    def _rest(self) -> list[Part]:
        return [] if self._splitter is None else self._spaced(self._splitter.end())

    def _spaced(self, pieces: Sequence[tuple[Channel, str]]) -> list[Part]:
        """The pieces as parts, without the white space around calls."""
        found = []
        for channel, text in pieces:
            self.is_reasoning = channel is Channel.REASONING
            if self.is_reasoning:
                found.append(Part("reasoning", text))
                continue
            if self._calls is not None:
                text = self._space + text
                if self._has_called and not self._has_said:
                    text = text.lstrip()
                body = text.rstrip()
                self._space, text = text[len(body) :], body
            if text:
                self._has_said = True
                found.append(Part("content", text))
        return found


def _pattern(calls: Format) -> Any:
    """A pattern of all marks with which a call, or a section of calls, begins or ends."""
    fixed = [*(calls.section or ()), *([] if calls.pattern else [calls.open])]
    patterns = [regex.escape(one) for one in fixed if one]
    if calls.pattern:
        patterns.append(calls.pattern)
    return regex.compile("|".join(patterns) if patterns else r"[{\[]", regex.DOTALL)


def _may_grow(calls: Format | None, mark: Any, length: int) -> bool:
    """Whether a mark without fixed text ends where the text ends for now, so that more text could belong to it."""
    return bool(calls and calls.pattern) and len(mark.group()) == length and not mark.group().endswith((">", "]"))


def _joined(parts: Iterable[Part]) -> list[Part]:
    """The parts, with neighbours of the same kind as one; calls stay apart."""
    found: list[Part] = []
    for part in parts:
        if found and part.kind == found[-1].kind != "tool_call":
            found[-1] = Part(part.kind, found[-1].text + part.text)
        else:
            found.append(part)
    return found
