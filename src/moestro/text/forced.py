"""A grammar that makes an answer one call of a tool, in llguidance's Lark, by the form that the family's calls have.

forced_call(find_responses(tokenizer), tools, "weather", prompt_ids)      # 'start: ...', or None
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .calls import schemas
from .marked_calls import Marked
from .responses import Responses
from .stream import decode

_SEEN = 24  # tokens at the end of a prompt in which a mark is found
_SPACE = {"whitespace_pattern": r"[ \n]{0,4}"}  # between the parts of JSON, or a small model writes nothing else
_ANY = r"/(?s:.*)/"


def forced_call(
    responses: Responses | None, tools: Sequence[Any], name: str | None, prompt: Sequence[int] = ()
) -> str | None:
    """A grammar of one call, with what is thought before it where the family thinks aloud.

    Args:
        tools: as OpenAI's chat has them. name: of the one that must be called; None for any of them.
        prompt: token ids that the answer continues; it may have begun what is thought.

    Returns:
        The grammar; None where this family's calls cannot be written as one.
    """
    if responses is None or responses.calls is None:
        return None
    known = {one: schema for one, schema in schemas(tools).items() if name in (None, one)}
    writer = _Writer(responses)
    call = responses.calls.grammar(writer, known)
    if call is None:
        return None
    if section := responses.calls.section:
        joint = "\n" if isinstance(responses.calls, Marked) else ""
        call = f"{writer.text(section[0] + joint)} {call} {writer.text(section[1])}"
    return "\n".join([f"start: {_thought(responses, writer, prompt)} {call}", *writer.rules])


def _thought(responses: Responses, write: _Writer, prompt: Sequence[int]) -> str:
    """What may be thought before the call, or must be brought to its end where the prompt has begun it."""
    channels = responses.channels
    if channels is None:
        return ""
    if channels.is_harmony:
        begin, then = write.text("<|channel|>analysis<|message|>"), write.text("<|start|>assistant")
        return f"({begin} {write.until('<|end|>')} {then})?"
    if not channels.marks:
        return ""
    opened = channels.opening(prompt) if prompt else ""
    space = r"/\n{0,2}/"
    ended = dict(channels.marks).get(opened)
    if ended is not None:
        return f"{write.until(ended)} {space}"
    said = decode(responses.tokenizer, list(prompt)[-_SEEN:], skip_special_tokens=False).rstrip()
    if any(said.endswith(end.strip()) for _, end in channels.marks):
        return ""  # the prompt has ended it
    choices = [f"{write.text(begin)} {write.until(end)} {space}" for begin, end in channels.marks]
    return f"({' | '.join(choices)})?"


class _Writer:
    """Writes pieces of a grammar, as `Grammar` says. rules: what the pieces refer to."""

    def __init__(self, responses: Responses) -> None:
        vocabulary = responses.tokenizer.added_tokens_decoder
        self._tokens = {token.content: index for index, token in vocabulary.items() if token.special}
        marks = sorted(map(re.escape, self._tokens), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(marks)})" if marks else r"((?!))")
        self.rules: list[str] = []

    def text(self, text: str) -> str:
        """As `Grammar` says."""
        pieces = [piece for piece in self._pattern.split(text) if piece]
        return " ".join(f"<[{self._tokens[one]}]>" if one in self._tokens else _quoted(one) for one in pieces)

    def json(self, schema: Mapping[str, Any]) -> str:
        """As `Grammar` says."""
        read = schema if isinstance(schema, dict) else {}  # true allows anything
        return self._rule("", f"%json {json.dumps({**read, 'x-guidance': _SPACE})}")

    def until(self, close: str) -> str:
        """As `Grammar` says."""
        before, *after = self._pattern.split(close, maxsplit=1)
        if not after:
            return self._rule(f"[suffix={_quoted(close)}]", _ANY)
        end = self.text("".join(after))
        return f"{self._rule(f'[suffix={_quoted(before)}]' if before else '', _ANY)} {end}"

    def _rule(self, options: str, body: str) -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
