"""The part of a grammar in which a model thinks aloud, before the part that its answer follows.

>>> print(Thinking([("<think>", "</think>")]).before())
start: ("<think>" thought_0 ("\\n" | "\\n\\n")?)? @answer
thought_0[suffix="</think>"]: /(?s:.*)/
text: /(?s:.*)/
<BLANKLINE>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import CheckpointError

_ANY = "/(?s:.*)/"
_GAP = r'("\n" | "\n\n")?'  # that models are used to write behind a thought


@dataclass(frozen=True, slots=True)
class Thinking:
    """How an answer thinks aloud.

    marks: pairs of texts that begin and end it. tokens: special token -> its number, of those in marks or channels.
    opened: the mark with which the prompt has begun it, or "". is_wanted: whether the answer itself may begin it.
    is_harmony: whether it is told apart by channels, as gpt-oss has them.
    """

    marks: Sequence[tuple[str, str]] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    opened: str = ""
    is_wanted: bool = True
    is_harmony: bool = False

    def before(self, *, has_channel: bool = False) -> str:
        """The grammar of thinking and of what follows it, `@answer`, in llguidance's dialect of Lark.

        Args:
            has_channel: whether `@answer` begins with the channel that it belongs to, where there are channels.

        Raises:
            CheckpointError: the tokenizer has not all tokens of its channels.
        """
        if self.is_harmony:
            return self._in_channels(has_channel)
        rules = [f"text: {_ANY}"]
        if self.opened:
            at = [begin for begin, _ in self.marks].index(self.opened)
            return "\n".join([f"start: {self._thought(at, rules)} @answer", *reversed(rules), ""])
        thoughts = [
            f"{' '.join(self._mark(begin))} {self._thought(at, rules)}"
            for at, (begin, _) in enumerate(self.marks)
            if self.is_wanted
        ]
        first = f"({' | '.join(thoughts)})? " if thoughts else ""
        return "\n".join([f"start: {first}@answer", *reversed(rules if thoughts else []), ""])

    def _thought(self, at: int, rules: list[str]) -> str:
        """What is thought, with the mark that ends it."""
        first, *rest = self._mark(self.marks[at][1].strip())
        if first.startswith("<"):
            return " ".join(["text", first, *rest, _GAP])
        rules.append(f"thought_{at}[suffix={first}]: {_ANY}")
        return " ".join([f"thought_{at}", *rest, _GAP])

    def pieces(self, mark: str) -> list[int | str]:
        """A mark as it is written: special tokens by their numbers, and texts."""
        named = [token for token in self.tokens if token in mark]
        pieces = re.split(f"({'|'.join(map(re.escape, named))})", mark) if named else [mark]
        return [self.tokens.get(piece, piece) for piece in pieces if piece]

    def _mark(self, mark: str) -> list[str]:
        """A mark in a grammar."""
        return [
            f"<[{one}]>" if isinstance(one, int) else json.dumps(one, ensure_ascii=False) for one in self.pieces(mark)
        ]

    def _in_channels(self, has_channel: bool) -> str:
        names = [f"<|{name}|>" for name in ("channel", "message", "end", "start", "constrain")]
        if missing := [name for name in names if name not in self.tokens]:
            raise CheckpointError(f"the tokenizer has no token {missing[0]}; use the one that belongs to the model")
        channel, message, end, begin, constrain = (f"<[{self.tokens[name]}]>" for name in names)
        aloud = f'({channel} ("analysis" | "commentary") {message} text {end} {begin} "assistant")*'
        own = "" if has_channel else f'{channel} "final" (" "? {constrain} "json")? {message} '
        return f"start: {aloud} {own}@answer\ntext: {_ANY}\n"
