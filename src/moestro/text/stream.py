"""An answer's text, token by token, equal to what the tokenizer makes of the whole sequence.

The text of an answer is the decoded sequence (prompt and answer, special tokens skipped) after the longest beginning
that it shares with the decoded prompt. Mostly that beginning is the whole decoded prompt. It is shorter where the
answer changes how the prompt ends: a character that the prompt began and the answer completed belongs to the answer,
and so do spaces that the decoder cleaned up.

A piece is passed on once no later token can change it. Decoding the whole sequence for each token would cost more and
more, so only a window of the last tokens is decoded. It begins where this does not change the text at its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.tokenization_python import PythonBackend

from ..errors import CheckpointError, faults_as

_WINDOW = 64  # tokens, before a shorter window is tried
_CONTEXT = 24  # the least characters of a window before the text that is not passed on yet
_SEAM = (
    8  # characters at the beginning of a window that may differ from the whole text: a decoder strips or cleans them
)
_CLEANED = 8  # characters, the last ones, that `clean_up_tokenization_spaces` can still change
_CLEAN_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet


class TextStream:
    """Decodes an answer as its tokens come. Knows nothing of stop strings and channels.

    Args:
        prompt: token ids of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._done = self._text = self._decode(self._ids)  # of the window: what is passed on, and what is decoded
        self._limit = _WINDOW
        self._changeable = _changeable_characters(tokenizer)
        self._shorten()

    def put(self, ids: Sequence[int]) -> str:
        """Append token ids; return the text that became final."""
        self._ids.extend(ids)
        if self._changeable is None:
            return ""
        self._text = self._decode(self._ids)
        piece = self._pass_on(self._final_characters())
        self._shorten()
        return piece

    def flush(self) -> str:
        """Return the rest of the text, at the end of the answer."""
        if self._changeable is None:
            self._text = self._decode(self._ids)
        return self._pass_on(len(self._text))

    def _pass_on(self, characters: int) -> str:
        """The first `characters` of the window's text, without what was passed on before."""
        final = self._text[:characters]
        if self._done.startswith(final):  # nothing new, or a prompt whose end may still change
            return ""
        shared = len(self._done) if final.startswith(self._done) else shared_length(self._done, final)
        self._done = final
        return final[shared:]

    def _final_characters(self) -> int:
        """How many characters of the window no later token can change."""
        if self._ends_in_bytes():
            return 0
        text = self._text[: len(self._text) - (self._changeable or 0)]
        return len(text.rstrip(_REPLACEMENT))

    def _ends_in_bytes(self) -> bool:
        """Whether the last token that adds text stands for a byte.

        A run of such tokens is decoded as a whole: one more byte can make all of it invalid.
        """
        for token in reversed(self._ids):
            if _BYTE.fullmatch(self._token(token)):
                return True
            if self._leaves_a_trace(token):
                return False
        return False

    def _leaves_a_trace(self, token: int) -> bool:
        """Whether a token alone decodes to text; False where it cannot be decoded alone."""
        try:
            return bool(self._decode([token]))
        except CheckpointError:
            return False

    def _shorten(self) -> None:
        """Where the window has grown, take a shorter one if it decodes to equal text after its first characters."""
        if len(self._ids) < self._limit:
            return
        pending = self._text[len(self._done) :] if self._text.startswith(self._done) else None
        tokens = _WINDOW // 4
        while pending is not None and 2 * tokens <= len(self._ids):
            if not any(_BYTE.fullmatch(self._token(token)) for token in self._ids[-tokens - 1 : -tokens + 1]):
                text = self._decode(self._ids[-tokens:])
                if len(text) - len(pending) >= _CONTEXT and self._text.endswith(text[_SEAM:]):
                    self._ids, self._text = self._ids[-tokens:], text
                    self._done = text[: len(text) - len(pending)]
                    break
            tokens += tokens // 2
        self._limit = max(_WINDOW, 2 * len(self._ids))

    def _token(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)


def shared_length(a: str, b: str) -> int:
    """The number of characters that two texts share at their beginning."""
    shorter = min(len(a), len(b))
    return next((at for at in range(shorter) if a[at] != b[at]), shorter)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of token ids.

    Raises:
        CheckpointError: the tokenizer cannot decode them.
    """
    if not len(ids):  # at which some decoders panic
        return ""
    remedy = "use the tokenizer that belongs to the model"
    with faults_as(CheckpointError, "the tokenizer cannot decode the model's tokens", remedy):
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def _changeable_characters(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many of the last characters of a decoded text later tokens may change; None for all.

    Bytes that are no character yet are not counted, since they are seen in the text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    if type(getattr(backend, "model", None)).__name__ == "BPE":  # which Transformers leaves as it is, unless told twice
        cleans = cleans and getattr(tokenizer, _CLEAN_BPE, False)
    characters = _CLEANED if cleans else 0
    if backend is None:  # in Python: only the plain join of tokens is known to leave alone what it has written
        joins = getattr(type(tokenizer), "convert_tokens_to_string", None)
        return characters if joins is PythonBackend.convert_tokens_to_string else None
    fused = False
    for part in _parts(json.loads(backend.to_str()).get("decoder")):
        if part["type"] == "Replace" and fused:  # before that, it sees one token at a time
            pattern = part["pattern"].get("String")
            if pattern is None:
                return None
            characters += len(pattern)
        fused |= part["type"] in ("Fuse", "ByteLevel")
    return characters


def _parts(decoder: Any) -> list[dict[str, Any]]:
    """The decoders of a sequence of them, in order."""
    if not decoder:
        return []
    return [part for each in decoder["decoders"] for part in _parts(each)] if "decoders" in decoder else [decoder]
