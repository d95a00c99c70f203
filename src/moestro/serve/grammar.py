"""Grammars that an answer follows token by token, by llguidance: a matcher says which tokens may come next.

>>> grammars = Grammars(tokenizer, vocabulary=4096, ends=[1])
>>> constraint = GrammarConstraint(grammars.matcher('start: "yes" | "no"'))
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError, first_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from .thinking import Thinking

_KEPT = 16  # compiled grammars
_SPACE = r"[ \t]{1,8}|\r?\n[ \t]{0,64}"  # between the parts of a JSON value: not without end, which small models like
# 500 optional properties are 2,000 items; 20,000 let a schema of 55,000 characters take 250 ms of one token's step.
_LIMITS: dict[str, Any] = {"max_lexer_states": 20_000, "max_items_in_row": 2000, "verbose_errors": False}
_JSON = {"whitespace_pattern": _SPACE, "lenient": False, "coerce_one_of": False}
_PIECES = {"Metaspace": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}], "Fuse": []}
_PLAINER = (  # of the compiler's words
    ("recursion limit exceeded", "it is nested too deeply"),
    ("too big", "it is too large; make it shorter"),
    ("schema too large", "it is too large; make it shorter"),
    ("NoExtension", "no answer follows it"),
    ("oneOf constraints", "parts of oneOf that may both hold are not supported; use anyOf"),
    ("is not present in a registry", "a $ref to another document is not supported; put what it names into $defs"),
)


class GrammarRefused(RequestError):
    """A grammar that llguidance cannot follow; says what of it."""


class GrammarFailed(RequestError):
    """A grammar grew past its limits in the middle of an answer."""


class Grammars:
    """Compiles grammars for a tokenizer, and keeps the last ones.

    Args:
        vocabulary: rows of the embedding; the tokenizer may have fewer tokens.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._kept: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._read: LLTokenizer | None = None
        self._lock = Lock()

    def matcher(self, start: str, others: Mapping[str, Any] | None = None) -> LLMatcher:
        """A matcher at the beginning of a grammar.

        Args:
            start: the grammar, in llguidance's dialect of Lark; `@name` stands for another one.
            others: name -> a JSON schema, or a grammar as text.

        Raises:
            GrammarRefused: as it says. RequestError: llguidance is missing, or does not read the tokenizer.
        """
        named = [{"name": "start", "lark_grammar": start}]
        for name, other in (others or {}).items():
            is_text = isinstance(other, str)
            value = {"lark_grammar": other} if is_text else {"json_schema": other | {"x-guidance": _JSON}}
            named.append({"name": name} | value)
        text = json.dumps({"grammars": named}, ensure_ascii=False)
        key = sha256(text.encode("utf-8", "replace")).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                self._kept[key] = self._compiled(text)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[key].deep_copy()

    def special_tokens(self) -> dict[str, int]:
        """The tokens that stand for no text in a grammar and are named by their numbers there: token -> number.

        Raises:
            RequestError: as `matcher`.
        """
        with self._lock:
            tokens = self._tokens()
        return {
            token.content: index
            for index, token in self._tokenizer.added_tokens_decoder.items()
            if tokens.is_special_token(index)
        }

    def _compiled(self, text: str) -> LLMatcher:
        tokens = self._tokens()
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(tokens, text, log_level=0, limits=LLParserLimits(**_LIMITS))
        if not matcher.is_error():
            if warnings := matcher.get_grammar_warnings():
                raise GrammarRefused(_plain(warnings[0]))
            matcher.compute_bitmask()  # the first one finds what no answer can follow
        if matcher.is_error():
            raise GrammarRefused(_plain(matcher.get_error()))
        return matcher

    def _tokens(self) -> LLTokenizer:
        if self._read is None:
            self._read = _read_tokens(self._tokenizer, self._vocabulary, self._ends)
        return self._read


def _plain(said: str) -> str:
    for sign, line in _PLAINER:
        if sign in said:
            return line
    if "regex parse error" in said:
        return f"its pattern cannot be read: {said.rstrip().rpartition('error: ')[2]}"
    return " ".join(said.split())[:200]


def _read_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: list[int]) -> LLTokenizer:
    """The tokenizer's bytes for each token, as llguidance holds them.

    Raises:
        RequestError: llguidance is not installed, or the tokenizer is none that it reads.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        line = "answers that follow a grammar need llguidance; install it on the server by pip install 'moestro[json]'"
        raise RequestError(line) from error
    if not ends:
        line = "an answer cannot follow a grammar here, since the model's generation_config names no token that ends it"
        raise RequestError(line)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    unread = "an answer cannot follow a grammar here, since llguidance does not read this model's tokenizer"
    if backend is None:
        raise RequestError(f"{unread}: it is one in Python")
    value = json.loads(backend.to_str())
    value["padding"] = value["truncation"] = None
    decoder = value.get("decoder") or {}
    if (pieces := _PIECES.get(decoder.get("type", ""))) is not None:
        value["decoder"] = {"type": "Sequence", "decoders": [*pieces, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    try:
        return LLTokenizer(json.dumps(value), n_vocab=max(vocabulary, len(tokenizer)), eos_token=ends)
    except ValueError as error:
        raise RequestError(f"{unread}: {first_line(error)[:80]}") from error


class GrammarConstraint:
    """Lets an answer follow a grammar, and end where that ends.

    Args:
        matcher: for this answer alone.
        thinking: as `Constraint` says.
    """

    def __init__(self, matcher: LLMatcher, thinking: Thinking | None = None) -> None:
        self._matcher, self.thinking = matcher, thinking

    def mask(self, logits: Tensor) -> None:
        """As `Constraint` says.

        Raises:
            GrammarFailed: the grammar grew past its limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        rows = len(logits)
        forbidden = torch.from_numpy(np.unpackbits(bits, bitorder="little")[:rows] == 0)
        logits[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
        logits[len(forbidden) :] = -torch.inf

    def accept(self, token: int) -> None:
        """As `Constraint` says."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = " ".join(self._matcher.get_error().split())[:200]
            raise GrammarFailed(f"the grammar became too large in the middle of the answer ({why}); make it simpler")
