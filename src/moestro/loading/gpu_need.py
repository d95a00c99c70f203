"""Measure the GPU memory that a generation needs besides weights, on a model that has no weights yet.

The model's own forward runs on the meta device, where tensors have sizes and no bytes: once for a prompt that fills
the context, once for the token after it. A dispatch mode follows each storage from the operation that makes it to the
end of its last tensor, so the peak is what the operations allocate, not an estimate. Three parts are replaced:

- the experts, by the memory that Moestro's kernels need (`experts_need`), since the family's own loop is not run;
- scaled dot product attention, by its output and the small tensors that a fused kernel keeps beside it: on meta it
  would make the scores, tokens x tokens, which a fused kernel never does. Families with attention in plain operations
  run these as on a GPU, with all their scores;
- the choice of a token, by Transformers' own samplers.

Memory that a kernel allocates inside itself and memory that the allocator loses to fragments are not seen; `Margin`
keeps room for both. Where a forward needs values (it reads an element, or counts nonzero ones), the closed form of
`planning/text_shape.py` is taken instead, and a log line says so.

Legend: T tokens, D model width, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..compute import gpu
from ..compute.experts import TOKENS_AT_ONCE, ExpertMath, ExpertWork, run_experts
from ..devices import Device
from ..engine.families import expert_modules
from ..errors import ModelError
from ..memory.allocations import META, StorageFollower, TooLong
from ..memory.formats import MatrixFormat
from ..planning.plan import Plan
from ..planning.spelling import spelled
from ..planning.text_shape import MOST_CAPTURED, Footprint, kept_by_captures, text_shape

logger = logging.getLogger("moestro")

MOST_CALLS = 100_000  # operations, about 3 s; a forward with more is measured at two shorter contexts and extrapolated
_SHORT = (64, 128)  # lengths of those two contexts: one and two chunks of a recurrent layer


@dataclass(frozen=True, slots=True)
class Need:
    """What contexts of a model on the meta device need: estimated by the closed form of its config, or measured.

    captures: whether its decode steps are captured, in memory that nothing else gets.
    """

    model: Any
    math: Sequence[ExpertMath]
    device: torch.device
    captures: bool = False

    def measured(self, context: int, chunk: int | None = None) -> Footprint:
        """The measured need of so many tokens, of which a prompt is read so many at a time; None for all."""
        return measure(self.model, self.math, context, self.device, chunk, captures=self.captures)

    def estimated(self, context: int, chunk: int | None = None) -> Footprint:
        """The need of so many tokens by arithmetic on the config; chunk: as in `measured`."""
        with META:
            return _estimate(self.model, self.math, context, self.device, chunk, captures=self.captures)

    @staticmethod
    def say_if_changed(estimated: Plan, measured: Plan) -> None:
        """Log a line if measuring changed whether the plan fits or how long its context is."""
        if (before := estimated.verdict()) != (after := measured.verdict()):
            logger.info("by the config alone %s on the GPU; measured, %s", before, after)


def measure(
    model: Any,
    math: Sequence[ExpertMath],
    context: int,
    device: torch.device,
    chunk: int | None = None,
    *,
    captures: bool = False,
) -> Footprint:
    """The memory that a generation of `context` tokens by a model on the meta device needs besides its weights.

    Args:
        math: what the experts of each MoE layer compute, in model order.
        context: tokens of the prompt and of the answer, in one sequence.
        device: where the model will run; its attention kernels decide which tensors are made.
        chunk: how many tokens of the prompt are read at a time; None for all.
        captures: whether decode steps are captured, in memory that nothing else gets.
    """
    attention = _Attention(device)
    try:
        try:
            return _measured(model, math, context, attention, MOST_CALLS, chunk, captures=captures)
        except TooLong:  # a layer reads the prompt token by token
            two = [_measured(model, math, tokens, attention, None, captures=captures) for tokens in _SHORT]
            return _extrapolated(two, context)
    except Exception as error:  # of any kind, from a family's code that needs values
        line = next(iter(str(error).splitlines()), type(error).__name__)
        logger.info("GPU memory is estimated: the forward of %s needs values (%s)", model.config.model_type, line[:80])
    with META:
        return _estimate(model, math, context, device, chunk, captures=captures)


def _extrapolated(two: Sequence[Footprint], context: int) -> Footprint:
    """The need of `context` tokens on a straight line through two measured needs."""
    a, b = two

    def at(name: str) -> int:
        low, high = getattr(a, name), getattr(b, name)
        return int(high + (high - low) / (b.context - a.context) * (context - b.context))

    return Footprint(context, at("kv_bytes"), at("prefill_bytes"), at("decode_bytes"), at("captured_bytes"))


def experts_need(math: ExpertMath, x: Tensor, device: torch.device) -> int:
    """Bytes that a device takes at most while it computes experts for x [T, D] on meta.

    Where the GPU kernels can compute the experts, these are their workspace, else the peak of `run_experts`. Its worst
    case is that two experts get all tokens: tensors of the first are still alive while the second computes a chunk of
    `TOKENS_AT_ONCE` tokens. Each expert is unpacked to float32 first.
    """
    if device.type == "cuda":
        with torch.device("cpu"):  # it tries the gate on numbers there
            kernel = gpu.kernel_of(math, x.dtype, device)
        if kernel is not None:
            return gpu.workspace_at_most(kernel, x.shape[0])
    tokens = min(x.shape[0], 2 * TOKENS_AT_ONCE)
    rows, weights = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
    packed = torch.empty(math.format.expert_bytes(math.shape), dtype=torch.uint8)
    work = ExpertWork(packed, range(math.shape.neurons), rows, weights)
    out = torch.empty(x.shape, dtype=torch.float32)
    with StorageFollower() as follower:
        run_experts(math, x, [work, work], out)
    needed: int = follower.peak_bytes
    return needed


def cache_bytes(cache: Any) -> int:
    """Bytes of the storages that a KV cache keeps."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in _tensors_in(cache, set()))}
    return sum(storages.values())


@torch.no_grad()
def _measured(
    model: Any,
    math: Sequence[ExpertMath],
    context: int,
    attention: _Attention,
    most_calls: int | None,
    chunk: int | None = None,
    *,
    captures: bool = False,
) -> Footprint:
    takes = {"use_cache": True} | ({"logits_to_keep": 1} if model._supports_logits_to_keep() else {})
    own_cache = not model._supports_default_dynamic_cache()  # as `generate` asks
    prompt = max(1, context - 1)
    last = min(prompt, chunk or prompt)  # the chunk that sees most; how the others are cut makes no difference to it
    captured = (MOST_CAPTURED,) if captures else ()
    before = [tokens for tokens in (min(last, prompt - last), prompt - 2 * last) if tokens > 0]
    with (
        _left_as_it_was(model),
        META,
        _stood_in(model, math, (*before, last, 1, *captured), attention.device),
        attention,
        StorageFollower(most_calls) as follower,
    ):

        def step(tokens: int, cache: Any) -> Any:
            ids, positions = torch.empty(1, tokens, dtype=torch.long), torch.empty(4, tokens, dtype=torch.long)
            mask = torch.empty(1, context, dtype=torch.long)
            out = model(input_ids=ids, past_key_values=cache, **takes)
            _choose(ids, out.logits)
            del mask, positions  # not passed on, since the model would read their values; a real step has them
            return out.past_key_values

        empty = None if own_cache else DynamicCache(config=model.config.get_text_config(decoder=True))
        cache, prefill_peak = empty, 0
        del empty
        for tokens in (*before, last):
            follower.peak_bytes = follower.live_bytes
            cache = step(tokens, cache)
            if tokens <= last:
                prefill_peak = max(prefill_peak, follower.peak_bytes)
        follower.peak_bytes = follower.live_bytes
        cache = step(1, cache)
        kv_bytes, decode_peak, captured_bytes = cache_bytes(cache), follower.peak_bytes, 0
        if captures:  # the most of those steps, whose memory graphs keep; experts in slots are graphs of their own
            follower.peak_bytes = before_bytes = follower.live_bytes
            ids = torch.empty(1, MOST_CAPTURED, dtype=torch.long)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            kept = kept_by_captures(math[0].shape.hidden, logits.shape[-1], logits.itemsize)
            captured_bytes = follower.peak_bytes - before_bytes + kept
    with META:
        captured_bytes += max((max(_needs_of(model, math, tokens, attention.device)) for tokens in captured), default=0)
    return Footprint(context, kv_bytes, max(0, prefill_peak - kv_bytes), max(0, decode_peak - kv_bytes), captured_bytes)


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Restore on exit all that a forward notes in its modules.

    For example, RoPE that depends on the length keeps the longest one and its frequencies, which have no values on
    meta.
    """
    before = [(m, dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _choose(ids: Tensor, logits: Tensor) -> Tensor:
    """Choose a token by the last of the logits [1, T, V] with all common samplers of Transformers; returns [1, 1]."""
    scores = logits[:, -1].to(dtype=torch.float32, copy=True)
    samplers = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), TopPLogitsWarper(0.95), MinPLogitsWarper(0.05))
    scores = LogitsProcessorList(samplers)(ids, scores)
    return torch.multinomial(scores.softmax(-1), 1)


@contextmanager
def _stood_in(model: Any, math: Sequence[ExpertMath], lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """Inside the block the model is in eval mode and its experts only allocate; both is undone on exit.

    Args:
        lengths: tokens of the steps to come. What experts need for them is found on entry, where nothing is followed
            yet.
    """
    modules = list(expert_modules(model).values())
    was_training = model.training
    model.eval()
    try:
        needs = [_needs_of(model, math, tokens, device) for tokens in lengths]
        for module, *of_layer in zip(modules, *needs, strict=True):
            module.forward = _allocating(dict(zip(lengths, of_layer, strict=True)))
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
        model.train(was_training)


def _needs_of(model: Any, math: Sequence[ExpertMath], tokens: int, device: torch.device) -> list[int]:
    """What each layer's experts need for so many tokens, by `experts_need`."""
    known: dict[Any, int] = {}  # by what distinguishes layers, since most are alike
    keys = [(of.shape, of.format.name, of.post_norm is None) for of in math]
    for key, of in zip(keys, math, strict=True):
        if key not in known:
            x = torch.empty(tokens, of.shape.hidden, dtype=model.dtype, device=META)
            known[key] = experts_need(of, x, device)
    return [known[key] for key in keys]


def _allocating(needs: Mapping[int, int]) -> Callable[..., Tensor]:
    """An experts function that allocates what a layer step allocates on a device, in the conductor's order.

    That is the routing in float32, the rows of each expert, two float32 sums [T, D] for the experts of the device and
    of the CPU, the experts' workspace, and the result.

    Args:
        needs: bytes of workspace, by the number of tokens.
    """

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, D]
        routing = top_k_weights.float(), torch.empty(top_k_index.numel(), dtype=torch.int64)
        sums = torch.empty(2, *x.shape, dtype=torch.float32)
        workspace = torch.empty(needs[x.shape[0]], dtype=torch.uint8)
        del workspace
        out = torch.empty_like(hidden_states)
        del sums, routing
        return out

    return forward


class _Attention(TorchFunctionMode):
    """Replaces scaled dot product attention where the device has a fused kernel for it, and leaves it elsewhere.

    It follows torch's own rules: on the CPU, heads must have one width. On CUDA, flash attention needs numbers of two
    bytes, one width up to 256, no mask and an Ampere card or newer; the memory-efficient kernel needs as many key heads
    as query heads and rows of a multiple of 16 bytes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self._on_cuda = device, device.type == "cuda"
        self._has_flash = self._on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and self._is_fused(*args, **(kwargs or {})):
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _is_fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> bool:
        widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
        if not self._on_cuda:
            return len(widths) == 1 and query.dim() == 4
        flash = self._has_flash and query.itemsize == 2 and len(widths) == 1 and max(widths) <= 256
        whole_rows = all(width * query.itemsize % 16 == 0 for width in widths)
        return (flash and attn_mask is None) or (whole_rows and query.shape[1] == key.shape[1])


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Allocate what fused attention does: [B, H, T, D] -> [B, H, T, D of value], and the log of each row's sum.

    The result is laid out by tokens. A mask of bools becomes numbers, and is copied again where its rows are no
    multiple of 16.
    """
    *batch, heads, tokens, _width = query.shape
    sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if attn_mask is not None:
        numbers = (
            attn_mask if attn_mask.dtype != torch.bool else attn_mask.new_empty(attn_mask.shape, dtype=query.dtype)
        )
        missing = -attn_mask.shape[-1] % 16
        padded = numbers.new_empty(*numbers.shape[:-1], numbers.shape[-1] + missing) if missing else None
        del numbers, padded
    out = query.new_empty(*batch, tokens, heads, value.shape[-1])
    del sums
    return out.transpose(-2, -3)


def _tensors_in(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object reaches by its attributes, lists and dicts."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    inside = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    for part in thing if isinstance(thing, list | tuple) else inside.values():
        yield from _tensors_in(part, seen)


def _estimate(
    model: Any,
    math: Sequence[ExpertMath],
    context: int,
    device: torch.device,
    chunk: int | None = None,
    *,
    captures: bool = False,
) -> Footprint:
    """The need by the closed form of `planning/text_shape.py`, with the experts' memory from `experts_need`."""
    shape = text_shape(model.config.to_dict(), model.dtype.itemsize)

    def experts_bytes(tokens: int) -> int:
        return max(experts_need(one, torch.empty(tokens, one.shape.hidden), device) for one in unlike)

    unlike = {(one.shape, one.format.name, one.post_norm is None): one for one in math}.values()  # layers are alike
    return shape.footprint(
        context, experts_bytes, scores_of_two_widths=device.type == "cpu", chunk=chunk, captures=captures
    )


def refuse_on_gpu(device: Device, formats: Iterable[MatrixFormat]) -> None:
    """Refuse weights that no kernel of a GPU reads.

    Raises:
        ModelError: there are such weights, and the device is a GPU.
    """
    if device.accelerator is None or device.is_pretended:
        return
    name = next((fmt.name for fmt in formats if fmt.is_strided), None)
    if name is not None:
        raise ModelError(
            f"weights in HQQ's groups of rows ({name}) are computed by the CPU's kernels alone; use "
            f"{spelled('device', 'cpu')}"
        )
