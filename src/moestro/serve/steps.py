"""What the engine's thread does with the model: a chunk of a prompt, a step of all rows; rows join and leave.

A prompt is read in chunks that begin at whole multiples, so that it is computed the same whatever runs beside it. Short
prompts that wait together are read in one forward, which reads each expert once for all of them (`together.py`). A
prompt joins the batch when its first token is there. A step that fails ends the answers that were in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import MoestroError, first_line
from .answer import Answer, Ended
from .batch import Batch
from .caches import Caches, Forward
from .prefixes import Prefixes, shared_tokens
from .requests import Finished
from .together import read_together, readable_together

logger = logging.getLogger("moestro")
CHUNK = 512  # tokens of a prompt between two steps of those that answer


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of prompts that were read and of answers that were written in steps, and the seconds of these steps."""

    read: int = 0
    read_s: float = 0.0
    written: int = 0
    written_s: float = 0.0


@dataclass(slots=True)
class _Reading:
    """An answer whose prompt is read, with its cache and how many tokens that holds."""

    answer: Answer
    cache: Any
    done: int


class Steps:
    """The requests that run. For one thread.

    rows: answers in the batch; where requests run alone, the one that answers. reading: those whose prompts are read:
    one, or several short ones.
    work: what was done so far.

    Args:
        on_end: called for each answer that is over.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Forward,
        caches: Caches,
        batch: Batch | None,
        prefixes: Prefixes,
        on_end: Callable[[Answer, Finished], None],
    ) -> None:
        self._model, self._forward, self._caches, self._batch = model, forward, caches, batch
        self._prefixes, self._on_end = prefixes, on_end
        self.rows: list[Answer] = []
        self.reading: list[_Reading] = []
        self.work = Work()
        self._alone: Any = None  # the cache of the only row, where there is no batch

    @property
    def read_tokens(self) -> tuple[int, int]:
        """Of the prompts that are read: how many tokens of how many."""
        return sum(one.done for one in self.reading), sum(one.answer.prompt_tokens for one in self.reading)

    def chosen(self, waiting: Sequence[Answer]) -> int:
        """How many of those that wait, from the first one on, are to be read next, in one forward."""
        if self._batch is None or len(waiting) < 2:
            return min(1, len(waiting))
        return readable_together([one.ids[0] for one in waiting], CHUNK, lambda ids: self._prefixes.find(ids)[1])

    def begin(self, answers: Sequence[Answer]) -> None:
        """Begin to read prompts; that of a single answer behind what is kept of it."""
        for answer in answers:
            answer.begun_s = perf_counter()
        if len(answers) > 1:
            self.reading = [_Reading(answer, None, 0) for answer in answers]
            return
        (answer,) = answers
        prompt = answer.ids[0]
        try:
            shared, cache = self._known(prompt)
        except Exception as error:
            self._fail(answer, error)
            return
        answer.cached_tokens = shared
        self.reading = [_Reading(answer, cache, shared)]

    def read(self) -> None:
        """Read a chunk of the prompt, or all of several; with the last one comes an answer's first token."""
        if len(self.reading) > 1:
            self._read_together()
            return
        (reading,) = self.reading
        answer = reading.answer
        end, begun_s = self._chunk_end(reading), perf_counter()
        try:
            if reading.cache is None:  # also the only one that is left of several
                reading.cache = self._caches.new(answer.prompt_tokens)
            ids = answer.ids[:, reading.done : end]
            logits, reading.cache = self._forward(ids, reading.cache, torch.arange(reading.done, end)[None])
            self._note_read(end - reading.done, perf_counter() - begun_s)
            reading.done = end
            if end < answer.prompt_tokens:
                if self._caches.is_whole and end == answer.prompt_tokens - 1:
                    self._keep(answer.ids[0, :end], lambda: self._caches.copied(reading.cache, end, end))
                return
        except Exception as error:
            self._drop_read(reading)
            self._fail(answer, error)
            return
        self._answer_read(reading, logits[0])

    def _read_together(self) -> None:
        """Read several prompts that share nothing, whole, in one forward."""
        together, begun_s = list(self.reading), perf_counter()
        try:
            logits, caches = read_together(self._forward, self._caches, [one.answer.ids[0] for one in together])
        except Exception as error:
            self.reading = []
            for one in together:
                self._fail(one.answer, error)
            return
        self._note_read(sum(one.answer.prompt_tokens for one in together), perf_counter() - begun_s)
        for one, row, cache in zip(together, logits, caches, strict=True):
            one.cache, one.done = cache, one.answer.prompt_tokens
            self._answer_read(one, row)

    def _answer_read(self, reading: _Reading, logits: Tensor) -> None:
        """The first token of an answer whose prompt is read: it joins the rows, unless it ends with it."""
        answer = reading.answer
        try:
            ended = answer.go_on(logits)
            if ended is None and self._batch is not None:
                self._batch.join(reading.cache)
        except Exception as error:
            self._drop_read(reading)
            self._fail(answer, error)
            return
        if ended is not None:
            self._drop_read(reading)
            self._keep(answer.ids[0, : reading.done], lambda: reading.cache)
            self._finish(answer, ended)
            return
        self.rows.append(answer)  # before it is no longer read: other threads count both
        self._drop_read(reading)
        if self._batch is None:
            self._alone = reading.cache

    def _drop_read(self, reading: _Reading) -> None:
        self.reading = [one for one in self.reading if one is not reading]

    def decode(self) -> None:
        """The next token of each row."""
        begun_s = perf_counter()
        try:
            tokens = [answer.last for answer in self.rows]
            if self._batch is not None:
                logits = self._batch.step(tokens)
            else:
                places = torch.tensor([[self.rows[0].length - 1]])
                logits, self._alone = self._forward(torch.tensor([tokens]), self._alone, places)
        except Exception as error:
            failed, self.rows, self._alone = self.rows, [], None
            if self._batch is not None:
                self._batch.clear()
            for answer in failed:
                self._fail(answer, error)
            return
        work = self.work
        written_s = work.written_s + perf_counter() - begun_s
        self.work = replace(work, written=work.written + len(tokens), written_s=written_s)
        for row in reversed(range(len(self.rows))):  # a row that leaves is replaced by the last one, which is done
            answer = self.rows[row]
            try:
                ended = answer.go_on(logits[row])
            except Exception as error:
                self._leave(row, clears=True)
                self._fail(answer, error)
                continue
            if ended is not None:
                self._leave(row)
                self._finish(answer, ended)

    def _note_read(self, tokens: int, seconds: float) -> None:
        work = self.work
        self.work = replace(work, read=work.read + tokens, read_s=work.read_s + seconds)

    def drop(self, is_dropped: Callable[[Answer], bool]) -> None:
        """End those that were cancelled."""
        for one in [one for one in self.reading if is_dropped(one.answer)]:
            self._drop_read(one)
            self._finish(one.answer, Ended("cancelled"))
        for row in reversed(range(len(self.rows))):
            if is_dropped(answer := self.rows[row]):
                self._leave(row)
                self._finish(answer, Ended("cancelled"))

    def _known(self, prompt: Tensor) -> tuple[int, Any]:
        """A cache for a prompt, int64 [tokens], with the tokens that were read before, and how many these are."""
        key, shared = self._prefixes.find(prompt)
        if self._batch is not None and self._caches.is_reused:  # a row that answers may begin alike
            each = [min(shared_tokens(one.ids[0, : one.length - 1], prompt), len(prompt) - 1) for one in self.rows]
            if max(each, default=0) > shared:
                row = each.index(max(each))
                return each[row], self._batch.taken(row, each[row], len(prompt))
        if not shared:
            return 0, self._caches.new(len(prompt))
        return shared, self._prefixes.copy_of(key, shared, len(prompt))

    def _chunk_end(self, reading: _Reading) -> int:
        total = reading.answer.prompt_tokens
        if not self._caches.is_reused:
            return total
        # A state that cannot be cut is kept before the last token, so that this prompt itself can be read again.
        last = total - 1 if self._caches.is_whole and reading.done < total - 1 else total
        if last - reading.done <= CHUNK:  # also across a multiple: a turn's new tokens are one forward
            return last
        return (reading.done // CHUNK + 1) * CHUNK

    def _leave(self, row: int, *, clears: bool = False) -> None:
        answer = self.rows[row]
        tokens = answer.ids[0, : answer.length - 1]
        if self._batch is None:
            cache, self._alone = self._alone, None
            if not clears:
                self._keep(tokens, lambda: cache)
        else:
            batch = self._batch
            if not clears:
                self._keep(tokens, lambda: batch.taken(row, len(tokens)))
            batch.leave(row, clears=clears)
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def _keep(self, tokens: Tensor, make: Callable[[], Any]) -> None:
        """Keep what was read, if there is memory for it; without it, no more than time is lost."""
        try:
            if self._prefixes.fits(len(tokens)):
                self._prefixes.keep(tokens, make())
        except (MemoryError, RuntimeError) as error:  # the latter is torch's word for it
            logger.warning("keys and values of %d tokens were not kept: %s", len(tokens), first_line(error))

    def _finish(self, answer: Answer, ended: Ended) -> None:
        self._on_end(answer, answer.finish(ended))

    def _fail(self, answer: Answer, error: Exception) -> None:
        kind = "" if isinstance(error, MoestroError) else f"{type(error).__name__}: "
        self._on_end(answer, answer.finish(Ended("error"), kind + first_line(error)))
