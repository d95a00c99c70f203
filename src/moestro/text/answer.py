"""An answer while it is made: its text up to the first stop string, each piece in the channel it belongs to.

answer = AnswerStream(tokenizer, prompt_ids, stop=["END"], on_text=print)
model.generate(..., streamer=answer)
answer.text, answer.reasoning
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .channels import Channel, Channels, Splitter
from .stream import TextStream, decode, shared_length

OnText = Callable[[str], None]


class AnswerStream(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Takes an answer's tokens and passes its text on as it becomes final.

    Args:
        tokenizer: of the model.
        prompt: token ids of the prompt.
        stop: texts that end the answer and do not belong to it.
        on_text, on_reasoning: called with each new piece of the answer, and of what the model thinks aloud.
        channels: the marks by which the two are told apart; None where all is text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
        channels: Channels | None = None,
    ) -> None:
        self._stream = TextStream(tokenizer, prompt)
        self._cutter = StopCutter(stop)
        self._splitter = None if channels is None else Splitter(channels, channels.opening(prompt))
        self._marks = {} if channels is None else channels.tokens
        self._said: dict[Channel, list[str]] = {channel: [] for channel in Channel}
        self._listeners = {Channel.ANSWER: on_text, Channel.REASONING: on_reasoning}
        self._is_prompt = True

    @property
    def text(self) -> str:
        """The answer so far: all pieces that went to `on_text`."""
        return "".join(self._said[Channel.ANSWER])

    @property
    def reasoning(self) -> str | None:
        """What was thought aloud so far; None where there was nothing."""
        has_reasoned = self._splitter is not None and self._splitter.has_reasoned
        return "".join(self._said[Channel.REASONING]) if has_reasoned else None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._cutter.is_stopped

    def put(self, value: Tensor) -> None:
        """Take the tokens that Transformers made in a step; the first ones are the prompt again."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.add(value.flatten().tolist())

    def add(self, ids: Sequence[int]) -> None:
        """Take token ids of the answer."""
        begin = 0
        for at, token in enumerate(ids):
            if token in self._marks:  # the text before a mark does not change any more
                self._pass_on(self._cutter.feed(self._stream.put(ids[begin : at + 1]) + self._stream.flush()))
                self._pass_on(self._cutter.flush())
                if not self.is_stopped:
                    self._pass_on(self._marks[token])
                begin = at + 1
        if ids[begin:]:
            self._pass_on(self._cutter.feed(self._stream.put(ids[begin:])))

    def end(self) -> None:
        """Pass the rest of the text on, at the end of the answer."""
        self._pass_on(self._cutter.feed(self._stream.flush()) + self._cutter.flush())
        if self._splitter is not None:
            self._say(self._splitter.end())

    def _pass_on(self, text: str) -> None:
        if text:
            self._say([(Channel.ANSWER, text)] if self._splitter is None else self._splitter.feed(text))

    def _say(self, pieces: Sequence[tuple[Channel, str]]) -> None:
        for channel, piece in pieces:
            self._said[channel].append(piece)
            listener: Any = self._listeners[channel]
            if listener is not None:
                listener(piece)


class StopCutter:
    """Passes on the text before the first stop string, in whatever pieces the text comes."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.is_stopped = False
        self._words = [word for word in stop if word]
        self._held = ""  # may be the beginning of a stop string

    def feed(self, text: str) -> str:
        """Take a piece; return the text that is certain not to belong to a stop string."""
        if self.is_stopped:
            return ""
        pending = self._held + text
        found, open_at = self._find(pending), self._opened(pending)
        if found is not None and found <= open_at:
            self.is_stopped, self._held = True, ""
            return pending[:found]
        self._held = pending[open_at:]
        return pending[:open_at]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        found = self._find(held)
        self.is_stopped |= found is not None
        return held[:found]

    def _find(self, text: str) -> int | None:
        return min((at for word in self._words if (at := text.find(word)) >= 0), default=None)

    def _opened(self, text: str) -> int:
        """The position from which on a text may be the beginning of a stop string; its length if there is none."""
        longest = max(map(len, self._words), default=1) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            if any(word.startswith(text[at:]) for word in self._words):
                return at
        return len(text)


class StopText(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends a generation at a stop string in the decoded text.

    Transformers' own criterion looks at each token of the vocabulary alone: it takes seconds to prepare, fails where
    the tokenizer cannot encode "abcdef", and does not know what a decoder makes of two tokens together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._words = tokenizer, [word for word in stop if word]
        self._seen = self._begin = prompt_tokens
        # A character takes 4 tokens at most; a few more tokens may add no text.
        self._reach = 4 * max(map(len, self._words), default=0) + 16

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row has come to a stop string with its newest tokens: bool [rows] for int64 [rows, tokens]."""
        new, self._seen = input_ids.shape[1] - self._seen, input_ids.shape[1]
        if not self._words or new <= 0:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        rows = input_ids[:, -self._reach - new :].tolist()
        asked = max(0, self._begin - max(0, input_ids.shape[1] - self._reach - new))  # tokens of the prompt among them
        return torch.tensor([self._ends(row, new, asked) for row in rows], dtype=torch.bool, device=input_ids.device)

    def _ends(self, ids: Sequence[int], new: int, asked: int) -> bool:
        for skips in (True, False):  # a stop string may be a special token, or continue after one
            text, before = (decode(self._tokenizer, part, skip_special_tokens=skips) for part in (ids, ids[:-new]))
            begin = shared_length(text, before)
            prompt = decode(self._tokenizer, ids[:asked], skip_special_tokens=skips) if asked else ""
            least = shared_length(text, prompt)  # a stop string is one of the answer alone
            if any(text.find(word, max(least, begin - len(word) + 1)) >= 0 for word in self._words):
                return True
        return False
