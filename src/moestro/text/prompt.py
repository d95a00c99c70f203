"""What a model is given for a prompt: the text itself, or the text as a message in the tokenizer's chat template.

prompt_for(tokenizer, "Why is the sky blue?").in_template      # True where there is a template
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError
from .generation import encode
from .templates import has_template, render


class Prompt(NamedTuple):
    """A prompt's token ids, int64 [tokens], and whether they are a message in a chat template."""

    ids: Tensor
    in_template: bool


def prompt_for(tokenizer: PreTrainedTokenizerBase, text: str, *, raw: bool = False) -> Prompt:
    """The tokens of a prompt.

    Args:
        raw: whether the text is continued as it is, also where there is a chat template.

    Raises:
        RequestError: the tokenizer cannot encode the text, or the chat template cannot write it.
    """
    if raw or not has_template(tokenizer):
        return Prompt(encode(tokenizer, text), False)
    if not text.strip():
        raise RequestError("the prompt is empty, and a chat template needs a message; --raw continues any text")
    try:
        written = render(tokenizer, [{"role": "user", "content": text}])
    except RequestError as error:
        raise RequestError(f"{error}; or --raw, which leaves the template out") from error
    return Prompt(encode(tokenizer, written, add_special_tokens=False), True)
