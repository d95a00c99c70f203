"""One request while it is served: its tokens, its text, when it ends, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..text.answer import StopCutter, StopText
from ..text.stream import TextStream
from .requests import Finished, Piece, Reason, Request
from .sampling import Chooser, ends_of
from .ticket import Ticket


@dataclass(frozen=True, slots=True)
class Ended:
    """Why an answer ended, and the text or token that ended it."""

    reason: Reason
    stop: str | int | None = None


class Answer:
    """A request, from its submission to its end.

    ids: int64 [1, prompt + new], with room for the whole answer; `length` of them are there.

    Args:
        new_tokens: at most.
    """

    def __init__(
        self,
        request: Request,
        ticket: Ticket,
        tokenizer: PreTrainedTokenizerBase,
        own: GenerationConfig,
        new_tokens: int,
    ) -> None:
        self.request, self.ticket = request, ticket
        self.prompt_tokens = self.length = len(request.prompt)
        self.cached_tokens = 0
        self._room = torch.empty(1, self.prompt_tokens + new_tokens, dtype=torch.int64)
        self._room[0, : self.prompt_tokens] = torch.tensor(request.prompt, dtype=torch.int64)
        own_stop: Any = own.stop_strings or ()
        self._stop = list(request.stop) or ([own_stop] if isinstance(own_stop, str) else list(own_stop))
        self._ends = {*ends_of(own), *request.stop_token_ids}
        self._chooser = Chooser(request, own)
        self._stream = TextStream(tokenizer, list(request.prompt))
        self._cutter = StopCutter(self._stop)
        self._seen = ""  # the last of the text, in which a stop string is found again
        self._stop_text = StopText(tokenizer, self._stop, self.prompt_tokens) if self._stop else None
        self.submitted_s = perf_counter()
        self.begun_s = self.first_s = 0.0

    @property
    def ids(self) -> Tensor:
        """Prompt and answer so far: int64 [1, tokens]."""
        return self._room[:, : self.length]

    @property
    def last(self) -> int:
        """The newest token."""
        return int(self._room[0, self.length - 1])

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self.length - self.prompt_tokens

    def go_on(self, logits: Tensor) -> Ended | None:
        """Choose the next token and pass it on; says whether the answer ends with it.

        Args:
            logits: float32 [vocabulary], on the CPU.
        """
        token, logprobs = self._chooser.choose(logits, self.ids)
        self.first_s = self.first_s or perf_counter()
        self._room[0, self.length] = token
        self.length += 1
        text = self._text_of(token)
        ended = self._ended(token)
        if ended is not None:
            text += self._cut(self._stream.flush()) + self._cutter.flush()
            if self._cutter.is_stopped and ended.reason == "length":
                ended = Ended("stop", self._stop_found())
        self.ticket.put(Piece(text, (token,), None if logprobs is None else (logprobs,)))
        return ended

    def finish(self, ended: Ended, error: str | None = None) -> Finished:
        """Tell the caller that the answer is over."""
        now_s = perf_counter()
        begun_s = self.begun_s or now_s
        first_s = self.first_s or now_s
        finished = Finished(
            ended.reason,
            self.prompt_tokens,
            self.cached_tokens,
            self.new_tokens,
            ended.stop,
            error,
            queued_s=begun_s - self.submitted_s,
            prompt_s=first_s - begun_s,
            decode_s=now_s - first_s,
        )
        self.ticket.put(finished)
        return finished

    def _text_of(self, token: int) -> str:
        """The text that is final with a token."""
        mark = self.request.marks.get(token)
        if mark is not None:  # the text before a mark does not change any more
            text = self._cut(self._stream.put([token]) + self._stream.flush()) + self._cutter.flush()
            return text if self._cutter.is_stopped else text + mark
        return "" if token in self._ends else self._cut(self._stream.put([token]))

    def _ended(self, token: int) -> Ended | None:
        if token in self._ends:
            return Ended("stop", token)
        is_special = self._stop_text is not None and bool(self._stop_text(self.ids, None).any())
        if self._cutter.is_stopped or is_special:
            return Ended("stop", self._stop_found())
        return Ended("length") if self.length == self._room.shape[1] else None

    def _cut(self, text: str) -> str:
        longest = max(map(len, self._stop), default=0)
        self._seen = (self._seen + text)[-longest - len(text) :] if longest else ""
        return self._cutter.feed(text)

    def _stop_found(self) -> str | None:
        """The stop string that came first; of one that is a special token, the only one that can be meant."""
        found = [(at, word) for word in self._stop if (at := self._seen.find(word)) >= 0]
        return min(found)[1] if found else self._stop[0] if len(self._stop) == 1 else None
