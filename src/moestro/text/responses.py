"""An answer's text told apart as it comes: what the model thinks aloud, what it says, which tools it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .channels import Channel, Channels, Splitter, find_channels

Kind = Literal["reasoning", "content", "tool_call"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer. text: of a tool call, its arguments as JSON. name: of the tool that is called."""

    kind: Kind
    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Responses:
    """How a family marks the parts of an answer. marks: special tokens whose text must stay in it."""

    channels: Channels

    @property
    def marks(self) -> dict[int, str]:
        """Special tokens that are marks, by id."""
        return self.channels.tokens

    @property
    def can_call(self) -> bool:
        """Whether calls of tools can be told apart."""
        return False


def find_responses(tokenizer: PreTrainedTokenizerBase) -> Responses | None:
    """How a tokenizer's family marks the parts of an answer; None where it does not."""
    channels = find_channels(tokenizer)
    return None if channels is None else Responses(channels)


class ResponseReader:
    """Tells one answer apart."""

    def __init__(self, formats: Responses | None, prompt: Sequence[int], tools: Sequence[Any] = ()) -> None:
        self._splitter = None if formats is None else Splitter(formats.channels, formats.channels.opening(list(prompt)))
        self.is_reasoning = False

    def feed(self, text: str) -> list[Part]:
        """Take a piece of text; return the parts that became final with it."""
        return [Part("content", text)] if self._splitter is None else self._parts(self._splitter.feed(text))

    def end(self) -> list[Part]:
        """The rest, at the end of the answer."""
        return [] if self._splitter is None else self._parts(self._splitter.end())

    def _parts(self, pieces: Sequence[tuple[Channel, str]]) -> list[Part]:
        for channel, _ in pieces:
            self.is_reasoning = channel is Channel.REASONING
        return [Part("reasoning" if channel is Channel.REASONING else "content", text) for channel, text in pieces]
