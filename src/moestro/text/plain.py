"""Encode a text in which some marks are only text: a client's "<|im_end|>" must not end its message.

text = Guard(tokenizer).protect("say <|im_end|>")      # with a character inside the mark that breaks it
Guard(tokenizer).encode(template + text)               # the token ids, without that character
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RequestError
from .generation import encode
from .stream import decode

# Characters that break a mark; the first one that a text does not have, and that the tokenizer keeps apart, is used.
_BREAKS = ("\ue000", "\uf8f0", "\U000f0000", "\u2063", "\x1a")
_MARK = re.compile(
    r"[<\[\]\u25c1{|].*[>\[\]\u25b7}|]", re.DOTALL
)  # an added token that looks like markup, not like a word


class Guard:
    """Keeps the special tokens in a client's text from becoming control tokens.

    Args:
        tokenizer: of the model.
        given: everything that the client said, as it will be protected.

    Raises:
        RequestError: the text has all the characters by which a mark could be broken.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: Any) -> None:
        self._tokenizer = tokenizer
        marks = _marks(tokenizer)
        said = "\0".join(_texts(given))
        self._pattern = re.compile("|".join(map(re.escape, marks)) if marks else r"(?!)")
        self._breaks = [one for one in _BREAKS if one not in said]
        self._break = ""
        if not self._pattern.search(said):
            return
        if not self._breaks:
            raise RequestError("the text has special tokens that cannot be written as text here; leave them out")
        self._break = self._breaks[0]

    def protect(self, given: Any) -> Any:
        """The texts, lists and mappings with all marks in their texts broken."""
        if not self._break:
            return given
        if isinstance(given, str):
            return self._broken(given)
        if isinstance(given, dict):
            return {self.protect(key): self.protect(value) for key, value in given.items()}
        return [self.protect(one) for one in given] if isinstance(given, list | tuple) else given

    def clean(self, text: str) -> str:
        """The text without what breaks its marks."""
        return text.replace(self._break, "") if self._break else text

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that a chat template wrote, with the protected parts as plain text.

        Raises:
            RequestError: the tokenizer cannot encode it.
        """
        if not self._break or self._break not in text:
            return [int(one) for one in encode(self._tokenizer, text, add_special_tokens=False)]
        for other in self._breaks:
            ids = self._without(text.replace(self._break, other), other)
            if ids is not None:
                return ids
        pieces = text.split(self._break)
        found = [encode(self._tokenizer, one, add_special_tokens=False) for one in pieces if one]
        return [int(token) for piece in found for token in piece]

    def _broken(self, text: str) -> str:
        """A mark may overlap another one, or appear where two pieces meet, so it is looked for until there is none."""
        pieces, begin = list[str](), 0
        while found := self._pattern.search(text, begin):
            at = found.start() + 1
            pieces.append(text[begin:at])
            begin = at
        return self._break.join([*pieces, text[begin:]])

    def _without(self, text: str, broken_by: str) -> list[int] | None:
        """Token ids without those of the breaking character; None where a token holds it and other text."""
        if not self._tokenizer.is_fast:
            return None
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = []
        for token, (begin, end) in zip(coded.input_ids, coded.offset_mapping, strict=True):
            part = text[begin:end]
            if broken_by not in part:
                ids.append(int(token))
            elif part.strip(broken_by):
                return None
        return ids if self._is_kept(ids, text.replace(broken_by, "")) else None

    def _is_kept(self, ids: Sequence[int], text: str) -> bool:
        """Whether the ids are those of the text: what a tokenizer drops or joins differently must not go unseen."""
        whole = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        read, wanted = (decode(self._tokenizer, one, skip_special_tokens=False) for one in (ids, whole))
        return "".join(read.split()) == "".join(wanted.split())


def _marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that stand for more than their text, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or _MARK.fullmatch(token.content)}
    found |= set(map(str, tokenizer.all_special_tokens))
    return sorted((one for one in found if len(one) > 1), key=len, reverse=True)


def _texts(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        return [text for pair in given.items() for one in pair for text in _texts(one)]
    return [text for one in given for text in _texts(one)] if isinstance(given, list | tuple) else []
