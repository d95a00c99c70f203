"""A conversation of several turns over one KV cache.

Each turn renders the whole conversation and reuses the cache for the tokens that did not change, so that only new
tokens are computed. It uses the tokenizer's chat template; without one, the conversation is a plain text that the
model continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engine.chunks import REREAD
from .answer import OnText
from .choices import choose
from .generation import TextResult, embedding_rows, encode, generate_text
from .options import TextOptions
from .reading import OnProgress
from .templates import Message, answer_message, check_template, has_template, render


class ChatSession:
    """A conversation: the turns so far and the KV cache of their tokens.

    Raises:
        RequestError: the chat template cannot write such a conversation.
        ModelError: the checkpoint's generation settings cannot be followed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: TextOptions,
        system: str | None = None,
        draft: PreTrainedModel | None = None,
    ) -> None:
        self._draft = draft
        self._model, self._tokenizer, self._options, self._system = model, tokenizer, options, system
        self.has_template = has_template(tokenizer)
        self.messages: list[Message] = []
        check_template(tokenizer, system)
        choose(options, model.generation_config, embedding_rows(model))
        self.reset()

    @property
    def system(self) -> str | None:
        """What the model is told first."""
        return self._system

    def tell_first(self, text: str) -> None:
        """Tell the model something else first, from the next answer on; what was said stays.

        Raises:
            RequestError: the chat template cannot write it.
        """
        check_template(self._tokenizer, text)
        self._system = text
        talk = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *talk]

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._cache: Any = None
        self._cached_ids: Tensor | None = None  # the tokens that the cache has read

    def ask(
        self,
        text: str,
        *,
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: OnProgress | None = None,
    ) -> TextResult:
        """Answer one message. A turn that fails or is refused does not change the conversation.

        Args:
            text: the message.
            on_text, on_reasoning: called with each new piece of the answer, and of what the model thinks aloud.
            should_stop: called after each step; True ends the answer there.
            on_progress: as in `generate_text`.

        Raises:
            RequestError: the conversation no longer fits the model's context, or the chat template refuses the message.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._render(messages)
        cache, self._cache = self._usable_cache(ids), None  # a failed turn leaves a cache of unknown length
        result = generate_text(
            self._model,
            self._tokenizer,
            ids,
            self._options,
            on_text=on_text,
            on_reasoning=on_reasoning,
            should_stop=should_stop,
            on_progress=on_progress,
            cache=cache,
            draft=self._draft,
        )
        self.messages = [*messages, answer_message(self._tokenizer, result.text, result.reasoning)]
        self._cache = result.cache
        self._cached_ids = None if result.cache is None else result.sequence[: result.cache.get_seq_length()]
        return result

    def _render(self, messages: Sequence[Message]) -> Tensor:
        if not self.has_template:
            # Answers continue what was said before them; each message begins a line of its own.
            joints = ["" if i == 0 or m["role"] == "assistant" else "\n" for i, m in enumerate(messages)]
            text = "".join(joint + message["content"] for joint, message in zip(joints, messages, strict=True))
            return encode(self._tokenizer, text)
        return encode(self._tokenizer, render(self._tokenizer, messages), add_special_tokens=False)

    def _usable_cache(self, ids: Tensor) -> Any:
        """The cache, cut to the first tokens that it shares with `ids`; None where it cannot be used."""
        if self._cache is None or self._cached_ids is None or self._model.config.model_type in REREAD:
            return None
        length = min(len(ids) - 1, len(self._cached_ids))  # at least one token is left to compute
        differs = (ids[:length] != self._cached_ids[:length]).nonzero()
        shared = int(differs[0]) if len(differs) else length
        if shared < len(self._cached_ids):
            try:
                self._cache.crop(shared - len(self._cached_ids))  # negative: how many to drop
            except (AttributeError, NotImplementedError, RuntimeError, ValueError):
                # Recurrent states and full sliding windows cannot be cut, so the history is read again.
                return None
        return self._cache
