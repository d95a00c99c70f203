"""Serves many requests by one model: a thread of its own runs the steps, other threads submit and take events.

    >>> engine = Engine(model, tokenizer, max_requests=2, context=64)
    >>> [*engine.submit(Request(prompt=[5, 6, 7], max_new_tokens=4))][-1].completion_tokens
    4
    >>> engine.close()
    True

Knows no network. See `steps.py` for what a turn of the thread does.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil
from time import perf_counter
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode.cpu.masks import MOST_TOKENS
from ..engine.chunks import free_ram
from ..errors import BudgetError, RequestError, first_line
from ..loading.context import model_context
from ..planning.budget import columns_for, format_bytes
from ..text.generation import check_ids, embedding_rows
from ..text.settings import check_settings
from .answer import Answer, Ended
from .batch import Batch
from .caches import Caches, Forward
from .prefixes import Prefixes
from .requests import EngineStopped, Finished, QueueFull, Request, TooLong
from .sampling import check_followed
from .steps import Steps, Work
from .ticket import Ticket

State = Literal["ready", "finishing", "closed", "failed"]
PREFIX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Progress:
    """What the engine does and has done; for a page of health or figures.

    running: answers in the batch. read_tokens: of the prompts that are read now, and how many they have. finished: by
    reason. kept, kept_bytes: sequences of which keys and values are kept. work: of all steps so far. error: of a thread
    that died.
    """

    state: State
    waiting: int = 0
    running: int = 0
    read_tokens: tuple[int, int] = (0, 0)
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    kept_bytes: int = 0
    work: Work = field(default_factory=Work)
    error: str | None = None


class Engine:
    """Serves requests until it is closed.

    batching: "batched", or "one at a time: " and why. queue: how many requests may wait. kv_bytes: of all rows,
    allocated at once.

    Args:
        max_requests: that run at a time, 1 to 64. context: tokens of prompt and answer of each; None for the model's.
        queue: how many more may wait. prefix_bytes: for keys and values of what was read, for later turns.

    Raises:
        RequestError: a number that is not possible. BudgetError: the rows do not fit in memory; with what would.
        ModelError: the checkpoint has settings that are not followed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_requests: int = 4,
        context: int | None = None,
        queue: int = 64,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self._model, self._tokenizer, self.queue = model, tokenizer, queue
        self._vocabulary, self._own = embedding_rows(model), model.generation_config
        check_settings(self._own, self._vocabulary)
        check_followed(self._own)
        self.context = _checked_context(model, max_requests, context, queue)
        forward = Forward(model)
        caches = Caches(model, forward)
        self.batching = "batched" if caches.why_alone is None else f"one at a time: {caches.why_alone}"
        self.max_requests = max_requests if caches.why_alone is None else 1
        self.kv_bytes = _checked_bytes(model, caches, self.max_requests, self.context)
        batch = Batch(caches, forward, self.max_requests, self.context) if caches.why_alone is None else None
        self._prefixes = Prefixes(caches, prefix_bytes)
        self._steps = Steps(model, forward, caches, batch, self._prefixes, self._note_end)
        self._wait: deque[Answer] = deque()
        self._changed = threading.Condition()  # guards what follows, and `_wait`
        self._progress = Progress("ready")
        self._stops = False  # running answers, too
        self._next: list[Answer] = []  # neither wait nor are read yet
        self._mean_s = 1.0  # of a request, from its begin to its end
        self._thread = threading.Thread(target=self._run, name="moestro-engine", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)  # a thread in the kernels must not outlive the interpreter

    def submit(self, request: Request, wake: Callable[[], None] | None = None) -> Ticket:
        """Have a request answered; returns at once.

        Args:
            wake: called by the engine's thread when an event is there, see `Ticket`.

        Raises:
            TooLong, QueueFull, EngineStopped: as they say. RequestError: tokens that the model does not have.
        """
        prompt_tokens = len(request.prompt)
        new_tokens = request.max_new_tokens or max(1, self.context - prompt_tokens)
        if prompt_tokens + new_tokens > self.context:
            raise TooLong(prompt_tokens, new_tokens, self.context)
        check_ids(self._tokenizer, torch.tensor(list(request.prompt)), self._vocabulary)
        strange = [token for token in request.sampling.logit_bias if not 0 <= token < self._vocabulary]
        if strange:
            raise RequestError(f"logit_bias names token {strange[0]}; the model has 0 to {self._vocabulary - 1}")
        ticket = Ticket(wake, self._cancel)
        answer = Answer(request, ticket, self._tokenizer, self._own, new_tokens)
        with self._changed:
            if self._progress.state != "ready":
                why = self._progress.error or "it is being closed"
                raise EngineStopped(f"the engine takes no requests: {why}; start the server again")
            if len(self._wait) >= self.queue + self._free():
                raise QueueFull(len(self._wait), self._retry_s())
            self._wait.append(answer)
            self._changed.notify_all()
        return ticket

    def progress(self) -> Progress:
        """What the engine does; never waits for the model."""
        with self._changed:
            return replace(self._progress, waiting=len(self._wait), finished=dict(self._progress.finished))

    def close(self, *, finish: bool = True, timeout_s: float | None = None) -> bool:
        """End: take no more requests, cancel those that wait, and the running ones too unless they are to finish.

        Returns:
            Whether the thread has ended in time.
        """
        with self._changed:
            if self._progress.state == "ready":
                self._progress = replace(self._progress, state="finishing")
            waiting, self._wait = list(self._wait), deque()
            self._stops |= not finish
            self._changed.notify_all()
        for answer in waiting:
            self._note_end(answer, answer.finish(Ended("cancelled")))
        self._thread.join(timeout_s)
        atexit.unregister(self._close_at_exit)
        return not self._thread.is_alive()

    def _close_at_exit(self) -> None:
        self.close(finish=False)

    def _cancel(self, ticket: Ticket) -> None:
        """A ticket was cancelled: one that waits ends here, others before the next step."""
        with self._changed:
            found = [answer for answer in self._wait if answer.ticket is ticket]
            for answer in found:
                self._wait.remove(answer)
            self._changed.notify_all()
        for answer in found:
            self._note_end(answer, answer.finish(Ended("cancelled")))

    def _is_dropped(self, answer: Answer) -> bool:
        return self._stops or answer.ticket.is_cancelled

    def _free(self) -> int:
        return max(0, self.max_requests - len(self._running()))

    def _running(self) -> list[Answer]:
        found = [*self._next, *(one.answer for one in self._steps.reading), *self._steps.rows]
        return list({id(answer): answer for answer in found}.values())

    def _retry_s(self) -> float:
        return float(max(1, ceil(self._mean_s * (len(self._wait) + 1) / self.max_requests)))

    def _note_end(self, answer: Answer, finished: Finished) -> None:
        with self._changed:
            now, counts = self._progress, dict(self._progress.finished)
            counts[finished.reason] = counts.get(finished.reason, 0) + 1
            self._progress = replace(
                now,
                finished=counts,
                prompt_tokens=now.prompt_tokens + finished.prompt_tokens,
                cached_tokens=now.cached_tokens + finished.cached_tokens,
                completion_tokens=now.completion_tokens + finished.completion_tokens,
            )
            if answer.begun_s:
                self._mean_s += (perf_counter() - answer.begun_s - self._mean_s) / 8

    def _run(self) -> None:
        """The thread: turns until it is closed. If it dies, every request ends with its error."""
        state: State
        error: str | None
        try:
            while self._turn():
                pass
            state, error = "closed", None
        except BaseException as fault:
            state, error = "failed", f"{type(fault).__name__}: {first_line(fault)}"
        with self._changed:
            left = [*self._wait, *self._running()]
            self._wait.clear()
            self._progress = replace(self._progress, state=state, error=error, running=0, read_tokens=(0, 0))
        for answer in left:
            answer.finish(Ended("error" if error else "cancelled"), error)

    def _turn(self) -> bool:
        """A chunk of a prompt, then a step of all that answer; waits for something to do. False: it is over."""
        steps = self._steps
        with self._changed:
            self._changed.wait_for(lambda: self._wait or self._running() or self._progress.state != "ready")
            if self._progress.state != "ready" and not self._running():
                return False
            places = 0 if steps.reading else self.max_requests - len(steps.rows)
            chosen = steps.chosen([*islice(self._wait, places)])
            self._next = [self._wait.popleft() for _ in range(chosen)]
        if self._next:
            steps.begin(self._next)
            self._next = []
        steps.drop(self._is_dropped)
        if steps.reading:
            steps.read()
            steps.drop(self._is_dropped)
        if steps.rows:
            steps.decode()
        with self._changed:
            self._progress = replace(
                self._progress,
                steps=self._progress.steps + 1,
                running=len(steps.rows),
                read_tokens=steps.read_tokens,
                kept=len(self._prefixes),
                kept_bytes=self._prefixes.n_bytes,
                work=steps.work,
            )
        return True


def _checked_context(model: PreTrainedModel, max_requests: int, context: int | None, queue: int) -> int:
    if not 1 <= max_requests <= MOST_TOKENS:
        raise RequestError(f"{max_requests} requests at a time; 1 to {MOST_TOKENS} are possible")
    if queue < 0:
        raise RequestError(f"{queue} requests may wait; it must be 0 or more")
    most = model_context(model.config)
    if context is None and most is None:
        raise RequestError("the model's config names no context; name one")
    wanted = most if context is None else context
    assert wanted is not None
    if wanted < 2 or (most is not None and wanted > most):
        raise RequestError(f"a context of {wanted} tokens; it must be 2 to {most or 'any'}, which is the model's")
    return wanted


def _checked_bytes(model: PreTrainedModel, caches: Caches, rows: int, context: int) -> int:
    """Memory of all rows' keys and values.

    Raises:
        BudgetError: there is not as much.
    """
    if (plan := model.moestro.gpu_plan) is not None:
        has_room = rows == 1 or plan.sequences > 1  # to move rows in
        plan.check_tokens(context if has_room else columns_for(context), 0, rows)
    n_bytes = rows * columns_for(context) * caches.token_bytes
    free_bytes = free_ram(model.moestro)
    if plan is None and n_bytes > free_bytes:
        fewer = int(rows * free_bytes / n_bytes)
        remedy = f"take {fewer} requests at a time, or " if fewer else ""
        raise BudgetError(
            f"{rows} requests of {context} tokens need {format_bytes(n_bytes)} of keys and values, but "
            f"{format_bytes(free_bytes)} of RAM are free; {remedy}a shorter context"
        )
    return n_bytes
