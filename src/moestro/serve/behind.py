"""Tells what is thought from the answer behind it, where an answer follows a grammar: nothing in it is a mark then.

reader = BehindThinking(thinking)
parts = reader.feed(piece.text, piece.token_ids)
parts = reader.end()
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..text.responses import Part
from .thinking import Thinking

_SPECIAL = "\ud800{}\udfff"  # a special token, told from a text that looks like it: no text has these characters
_ANY_SPECIAL = re.compile("\ud800[^\udfff]*\udfff")


class BehindThinking:
    """Reads an answer whose grammar was made by the same `Thinking`, token by token.

    White space around what is thought is dropped, and so are empty lines behind it. The answer is content as it is,
    whatever marks its texts hold.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._tokens = {number: token for token, number in thinking.tokens.items()}
        self._is_harmony = thinking.is_harmony
        ends = {begin: _marked(thinking, end.strip()) for begin, end in thinking.marks}
        self._end = ends.get(thinking.opened, "")  # of the thought that goes on
        self._ends = {_marked(thinking, begin): end for begin, end in ends.items()} if thinking.is_wanted else {}
        self._pending = ""
        self._space = self._joint = ""  # white space that may end a thought; what separates two thoughts
        self._has_said = self._is_answer = self._is_begun = False
        self.is_reasoning = bool(self._end)

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Part]:
        """Take a piece of text, which ends with the token's text where that is a special one."""
        for token in token_ids:
            name = self._tokens.get(token)
            if name is not None and text.endswith(name):
                text = text.removesuffix(name) + _SPECIAL.format(token)
        self._pending += text
        self.is_reasoning = bool(self._end)
        found = list(self._parts())
        self.is_reasoning |= bool(self._end)
        return found

    def end(self) -> list[Part]:
        """The rest, at the end of the answer; of a header that was cut, nothing."""
        rest = "" if self._is_harmony and not self._end else _ANY_SPECIAL.sub("", self._pending)
        self._pending = ""
        if self._end:
            return self._thought(rest)
        return [Part("content", rest)] if rest else []

    def _parts(self) -> Iterator[Part]:
        while self._pending:
            if self._is_answer:
                text = _ANY_SPECIAL.sub("", self._pending)
                text = text if self._is_begun else text.lstrip("\n")
                self._pending, self._is_begun = "", self._is_begun or bool(text)
                if text:
                    yield Part("content", text)
            elif self._end:
                at = self._pending.find(self._end)
                until = at if at >= 0 else len(self._pending) - _overlap(self._pending, self._end)
                yield from self._thought(self._pending[:until])
                self._pending = self._pending[until:]
                if at < 0:
                    return
                self._pending = self._pending[len(self._end) :]
                self._end, self._space, self._joint = "", "", "\n" if self._has_said else ""
                self._is_answer = not self._is_harmony
            elif not (self._enter_channel() if self._is_harmony else self._enter()):
                return

    def _enter(self) -> bool:
        """Enter a thought, or the answer if none begins; says whether that is decided."""
        for begin, end in self._ends.items():
            if self._pending.startswith(begin):
                self._pending, self._end = self._pending[len(begin) :], end
                return True
        self._is_answer = not any(begin.startswith(self._pending) for begin in self._ends)
        return self._is_answer

    def _enter_channel(self) -> bool:
        """Enter what follows a message's header; says whether that is whole."""
        numbers = {token: _SPECIAL.format(number) for number, token in self._tokens.items()}
        header, message, rest = self._pending.partition(numbers["<|message|>"])
        if not message:
            return False
        self._pending = rest
        if header.rpartition(numbers["<|channel|>"])[2].startswith("final"):
            self._is_answer = True
        else:
            self._end = numbers["<|end|>"]
        return True

    def _thought(self, text: str) -> list[Part]:
        text = self._space + _ANY_SPECIAL.sub("", text)
        body = text.rstrip()
        self._space = text[len(body) :] if body else text
        if body and (self._joint or not self._has_said):
            body, self._joint = self._joint + body.lstrip(), ""
        self._has_said |= bool(body)
        return [Part("reasoning", body)] if body else []


def _marked(thinking: Thinking, mark: str) -> str:
    return "".join(_SPECIAL.format(one) if isinstance(one, int) else one for one in thinking.pieces(mark))


def _overlap(text: str, end: str) -> int:
    """How many of the last characters of a text begin an end."""
    return next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)
