"""Small tokenizers, one for each kind of decoder that checkpoints have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

WORDS = [
    "once",
    "upon",
    "a",
    "time",
    ".",
    ",",
    "!",
    "'",
    "n't",
    "s",
    "'s",
    "th",
    "ing",
    "\n",
    "\n\n",
    "1",
    "é",
    "日本",
    "🙂",
]
SPACES = ["▁", "▁▁", "▁▁▁▁"]
SPECIALS = ["<s>", "</s>", "<|mid|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _fast(vocab: Sequence[str], decoder: Any, *, cleans: bool = False, unigram: bool = True) -> Any:
    words = list(dict.fromkeys(["<unk>", *SPECIALS, *vocab]))
    if unigram:
        model: Any = models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=False)
    else:
        model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=cleans,
    )


def _spaced() -> list[str]:
    return [*WORDS, *SPACES, *(f"▁{word}" for word in WORDS)]


def llama() -> Any:
    """As Llama's and Mixtral's: spaces, bytes, one space less at the beginning."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _fast([*_spaced(), *BYTES], decoders.Sequence(parts))


def byte_level() -> Any:
    """As GPT-2's and Qwen's: each token is some bytes, which may be half a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    pieces = [f" {word}" for word in WORDS] + WORDS + ["\xe9"]
    vocab = ["".join(letters[byte] for byte in piece.encode()) for piece in pieces]
    return _fast([*vocab, *letters.values()], decoders.ByteLevel())


def metaspace(scheme: str) -> Any:
    """As SentencePiece's, with each way to treat the first space."""
    return _fast(_spaced(), decoders.Metaspace(prepend_scheme=scheme))


def word_piece(cleans: bool) -> Any:
    """As BERT's: spaces between words unless a token says that it continues one."""
    vocab = [*WORDS, *(f"##{word}" for word in WORDS)]
    return _fast(vocab, decoders.WordPiece(cleanup=cleans), cleans=cleans, unigram=False)


def word_level(cleans: bool) -> Any:
    """Tokens are joined as they are, and Transformers cleans the spaces."""
    return _fast([*WORDS, " ", " '", " n", "'t", " ' ", "  "], decoders.Fuse(), cleans=cleans, unigram=False)


def ctc() -> Any:
    """As speech models': a token that repeats is one."""
    return _fast([*WORDS, "|", "<pad>"], decoders.CTC(pad_token="<pad>"), unigram=False)


def bpe() -> Any:
    """As the first GPT's: words end in a mark."""
    return _fast([*WORDS, *(f"{word}</w>" for word in WORDS)], decoders.BPEDecoder("</w>"), unigram=False)


def rewriting() -> Any:
    """A decoder that rewrites the joined text, across tokens."""
    parts = [decoders.Fuse(), decoders.Replace("th'", "the "), decoders.Replace(" a", "@")]
    return _fast([*WORDS, " ", " a"], decoders.Sequence(parts), unigram=False)


class _Slow(PreTrainedTokenizer):  # type: ignore[misc]  # transformers is not typed
    """A tokenizer in Python, as some checkpoints bring."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        self._words = list(dict.fromkeys(["<unk>", *SPECIALS, *_spaced()]))
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._words.index(token) if token in self._words else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").strip()


def slow() -> Any:
    """Python's, which strips the whole text at both ends."""
    return _Slow()


class _Joining(_Slow):
    """As CTRL's and BERTweet's: a mark at a token's end joins it to the next one."""

    def __init__(self, **kwargs: Any) -> None:
        self._words = list(dict.fromkeys(["<unk>", *SPECIALS, *WORDS, *(f"{word}@@" for word in WORDS)]))
        PreTrainedTokenizer.__init__(self, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace("@@ ", "").strip()


def joining() -> Any:
    """Python's, which joins words across tokens."""
    return _Joining()


def strips_ends() -> Any:
    """A decoder that strips the end of the joined text, and panics where there is too little of it."""
    parts = [decoders.Fuse(), decoders.Strip(" ", 0, 3)]
    return _fast([*WORDS, " ", "  "], decoders.Sequence(parts), unigram=False)


def byt5() -> Any:
    """Python's, of single bytes, which leaves out bytes that are no character."""
    return ByT5Tokenizer()


KINDS = {
    "llama": llama,
    "byte_level": byte_level,
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_never": lambda: metaspace("never"),
    "word_piece": lambda: word_piece(False),
    "word_piece_cleaned": lambda: word_piece(True),
    "fuse": lambda: word_level(False),
    "fuse_cleaned": lambda: word_level(True),
    "ctc": ctc,
    "bpe": bpe,
    "rewriting": rewriting,
    "slow": slow,
    "joining": joining,
    "byt5": byt5,
}


def chatting(marks: Sequence[str], how: str) -> Any:
    """A tokenizer that spells out all text, with marks.

    how: "special" or "added" tokens; or "spelled", like all text, where only the chat template names them.
    """
    import string

    vocab = {word: index for index, word in enumerate([*(() if how == "spelled" else marks), *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if how != "spelled":
        tokenizer.add_tokens([AddedToken(mark, special=how == "special", normalized=False) for mark in marks])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    if how == "spelled":
        fast.chat_template = "{{ '" + "".join(marks) + "' }}"
    return fast
