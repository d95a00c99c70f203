"""Several tokens a step, guessed by a draft model or from the text itself.

Transformers guesses, compares, and drops what was wrong from the KV cache again. Here are the checks before a model is
loaded, the draft, and a start from a cache that holds tokens already, as in a chat.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any
from weakref import ref

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, StaticLayer

from ..decode.cpu.cache import RoomLayer
from ..errors import RequestError
from ..loading.load import load, load_tokenizer
from ..loading.model import config_and_class
from ..planning.budget import LEAST_PLAIN_BYTES, parse_bytes
from ..planning.options import ModelOptions, Options
from ..planning.spelling import spelled
from .options import TextOptions

DRAFTED = 5  # tokens that a draft guesses at once: each more makes more experts of a step active
_GOES_BACK = {DynamicLayer, RoomLayer, StaticLayer}  # layers that drop any number of tokens and are as they were


@dataclass(frozen=True, slots=True)
class AssistedFigures:
    """What guessing brought.

    steps: of the model, the prompt's included. accepted_tokens: guesses that were right. drafted_tokens: that a draft
    model made; None where they come from the text.
    """

    steps: int
    accepted_tokens: int
    drafted_tokens: int | None

    def to_json(self) -> dict[str, int | None]:
        """The figures as `--json` prints them."""
        return {name: getattr(self, name) for name in ("steps", "accepted_tokens", "drafted_tokens")}

    def describe(self) -> str:
        """The figures in words."""
        of = "" if self.drafted_tokens is None else f" of {self.drafted_tokens}"
        return f"{self.accepted_tokens}{of} guessed tokens were right, in {self.steps} steps"


def check_goes_back(flag: str, name: str, kind: Any, config: Any) -> None:
    """Refuse a model whose cache cannot drop wrong guesses again, or whose answers guesses would change.

    Indexed layers choose among tokens of equal score by how many there are, so a step of several tokens may see others
    than several steps do. What the layers of a family's own do is not known.

    Args:
        flag: the option that wants guesses. name: of the model. kind: its class; None where that is not known.

    Raises:
        RequestError: it has recurrent states, indexed layers, or a cache of its own.
    """
    if kind is None:
        return
    keeps = kind._is_stateful or not kind._supports_default_dynamic_cache()
    layers = [] if keeps else DynamicCache(config=config.get_text_config(decoder=True)).layers
    unknown = {type(layer) for layer in layers if type(layer).__module__ != DynamicLayer.__module__}
    if keeps or unknown or any(type(layer) is DynamicIndexedLayer for layer in layers):
        raise RequestError(
            f"{flag}: {name} is a {kind.__name__}, whose cache cannot take wrong guesses back without a "
            "trace; leave the option out"
        )


def check_guesses(
    options: TextOptions, model: str | None, source: ModelOptions, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse, before a model is loaded, guesses that cannot be had with it.

    Raises:
        RequestError: as `check_goes_back` and `check_draft`.
    """
    if options.draft is None and not options.prompt_lookup:
        return
    name = spelled("draft" if options.draft else "prompt_lookup")
    config, kind = config_and_class(model, source)
    check_goes_back(name, model or str(source.shape), kind, config)
    if options.draft is not None:
        check_draft(options.draft, model, source, tokenizer)


def check_draft(draft: str, model: str | None, source: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a draft that has other tokens than the model; loads no weights.

    Raises:
        RequestError: a line with both names and what differs.
    """
    name = model or source.shape
    of_draft = load_tokenizer(draft, trust_remote_code=source.trust_remote_code)
    ours, theirs = (dict(each.get_vocab()) for each in (tokenizer, of_draft))
    remedy = "a draft needs the model's own tokens; name another one"
    if ours != theirs:
        different = min((ours.items() ^ theirs.items()), key=lambda item: item[1])
        raise RequestError(
            f"{spelled('draft', draft)} has another tokenizer than {name}: {len(theirs)} tokens beside "
            f"{len(ours)}, and {different[0]!r} (id {different[1]}) is in one of them alone; {remedy}"
        )
    own, kind = config_and_class(draft, ModelOptions(trust_remote_code=source.trust_remote_code))
    check_goes_back(spelled("draft"), draft, kind, own)
    config = config_and_class(model, source)[0]
    is_text = all(each.get_text_config() is each for each in (config, own))
    if not is_text and config.model_type != own.model_type:
        raise RequestError(
            f"{spelled('draft', draft)} is a {own.model_type} and {name} a {config.model_type}, of which one is "
            "more than a text model; their steps take different arguments, so name a draft of the same family"
        )
    rows = [each.get_text_config().vocab_size for each in (config, own)]
    if rows[0] != rows[1]:
        given = spelled("draft", draft)
        raise RequestError(f"{given} has {rows[1]} rows of tokens, but {name} has {rows[0]}; {remedy}")


def load_draft(draft: str, source: ModelOptions, options: Options) -> tuple[PreTrainedModel, Options]:
    """Load a draft on the CPU, in the bits of the model.

    Args:
        source, options: the model's.

    Returns:
        The draft, and the model's options with what is left of the RAM that it may use.

    Raises:
        MoestroError: as `load`. RequestError: nothing of that RAM is left.
    """
    taken = ("threads", "bits", "expert_bits", "dense_bits", "head_bits", "fit", "cache", "fuse", "pack_dense", "ram")
    own = {name: getattr(options, name) for name in taken}
    loaded = load(draft, device="cpu", dtype=source.dtype, trust_remote_code=source.trust_remote_code, **own)
    loaded.generation_config.update(
        num_assistant_tokens=DRAFTED, num_assistant_tokens_schedule="constant", max_length=None
    )
    if options.ram is None:
        return loaded, options
    left = parse_bytes(options.ram, "ram") - draft_bytes(loaded)
    if left < LEAST_PLAIN_BYTES:
        given = f"{spelled('draft', draft)} alone fills {spelled('ram', options.ram)}"
        raise RequestError(f"{given}; give more, or leave the draft out")
    return loaded, replace(options, ram=left)


def draft_bytes(draft: PreTrainedModel) -> int:
    """RAM that a draft's weights take."""
    spec = draft.moestro.spec
    return int(spec.dense_bytes + sum(layer.experts * layer.expert_bytes for layer in spec.layers))


@contextmanager
def drafting() -> Iterator[None]:
    """Keep to itself, inside the block, what Transformers logs of how it calls a draft's `generate`."""
    logger = logging.getLogger("transformers.generation.utils")

    def is_ours(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Passing `generation_config` together with")

    logger.addFilter(is_ours)
    try:
        yield
    finally:
        logger.removeFilter(is_ours)


def forwards_of(draft: PreTrainedModel) -> int:
    """How many tokens a draft has guessed since it was loaded: each takes a forward."""
    conductor = draft.moestro
    return int(conductor.counters.layer_steps // len(conductor.spec.layers))


def goes_on(cache: Any) -> bool:
    """Whether a cache from which wrong guesses were dropped can drop more, and go on.

    Transformers keeps of a sliding window or a convolution only what the next step needs, and no longer says so.
    """
    return all(type(layer) in _GOES_BACK for layer in getattr(cache, "layers", ()))


def begin_behind(model: PreTrainedModel, cache: Any) -> None:
    """Have assisted decoding begin behind the tokens that a cache holds, where it is given all ids of the text.

    Transformers' other ways of generating do so by themselves; that one would compute all of them again behind them.
    """
    cache._moestro_begins = True
    if hasattr(model.prepare_inputs_for_generation, "_moestro_original"):
        return
    original, find = type(model).prepare_inputs_for_generation, ref(model)

    @wraps(original)
    def prepare(input_ids: Tensor, next_sequence_length: int | None = None, **given: Any) -> Any:
        found = find()
        assert found is not None
        behind: Any = given.get("past_key_values")
        if getattr(behind, "_moestro_begins", False):
            behind._moestro_begins = False  # only the first step is given all ids
            if next_sequence_length is None:
                next_sequence_length = input_ids.shape[1] - int(behind.get_seq_length())
        return original(found, input_ids, next_sequence_length=next_sequence_length, **given)

    prepare._moestro_original = original  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = prepare
