"""What a text model keeps and allocates beside its weights, by arithmetic on the numbers of its config.json.

    >>> config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}
    >>> text_shape(config).footprint(1024, experts_bytes=lambda tokens: 0).kv_bytes
    1048576

The cache is exact for full, grouped, sliding and latent attention. Linear attention, state space layers and compressed
caches are bounded from above, as are the activations. `loading/gpu_need.py` measures both on a model without weights.

Legend: T tokens of a step, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .contract import ModelSpec
from .costs import LayerSpec

MOST_CAPTURED = 16  # tokens of a step, over its sequences, that a device captures
# Tokens whose logits captured steps keep: those of 1 to 16 tokens, which guesses ask for in turns.
KEPT_TOKENS = MOST_CAPTURED * (MOST_CAPTURED + 1) // 2
TOKENS_AT_ONCE = 1024  # of one expert that go through its FFN at once: bounds the intermediate [n, F] in memory

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LOGIT_BYTES = 48  # of each logit while a token is chosen: float32 copies, sorted values, int64 indices
# The families whose attention Transformers writes in plain operations, which make the scores of every head.
PLAIN_ATTENTION = {
    *("deepseek_v4", "flint", "gpt_oss", "granitemoe_swa", "hy_v4", "mimo_v2_flash"),
    *("inkling2", "inkling2_text", "inkling_mm_model", "inkling_text"),
}
# Those whose attention the CPU's own kernels compute, where no config asks for more than they know.
FUSED_ATTENTION = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "solar_open", "phimoe"),
}
_TEXT_PARTS = ("text_config", "thinker_config", "language_config", "llm_config")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one sequence of `context` tokens needs besides weights.

    kv_bytes: the cache when it is full. prefill_bytes, decode_bytes: the most at once beside that, while a prompt of
    the whole context is read and while one token is added to a full cache. captured_bytes: what captured steps have to
    themselves, whatever else runs. measured: False of an estimate.
    """

    context: int
    kv_bytes: int
    prefill_bytes: int
    decode_bytes: int
    captured_bytes: int = 0
    measured: bool = True

    @property
    def step_bytes(self) -> int:
        """The most that a step which is not captured takes beside the cache."""
        return max(self.prefill_bytes, self.decode_bytes)

    @property
    def activation_bytes(self) -> int:
        """The most at once beside the cache."""
        return self.step_bytes + self.captured_bytes


@dataclass(frozen=True, slots=True)
class KeptCache:
    """What a layer, or a part of one, keeps of a sequence.

    token_bytes: for every `stride` tokens of the last `window` (None: of all). fixed_bytes: whatever the length is.
    """

    token_bytes: int = 0
    window: int | None = None
    fixed_bytes: int = 0
    stride: int = 1

    def n_bytes(self, context: int) -> int:
        """Bytes kept of a sequence of so many tokens."""
        return self.fixed_bytes + self.token_bytes * -(-min(context, self.window or context) // self.stride)


@dataclass(frozen=True, slots=True)
class TextShape:
    """A text model's caches and widths, in numbers of elements unless they say bytes.

    context: the most tokens that it was made for; None where its config names no length. expanded: numbers that
    attention makes of each cached token for all its heads, beside the cache. heads_width: all query heads together.
    inner: the widest dense layer's inside. streams: parallel residual streams. linear: what linear attention keeps of
    each token while it reads a prompt. score_heads: heads whose scores [T, context] are made, where no fused kernel
    does without them. masks: of [T, context], which windows need.
    """

    context: int | None
    caches: tuple[KeptCache, ...]
    item_bytes: int
    hidden: int
    heads: int
    heads_width: int
    expanded: int
    inner: int
    streams: int
    linear: int
    score_heads: int
    masks: int
    one_width: bool  # whether queries, keys and values are equally wide
    vocabulary: int

    def kv_bytes(self, context: int) -> int:
        """Bytes of a full cache of so many tokens."""
        return sum(cache.n_bytes(context) for cache in self.caches)

    def footprint(
        self,
        context: int,
        experts_bytes: Callable[[int], int],
        *,
        scores_of_two_widths: bool = False,
        chunk: int | None = None,
        captures: bool = False,
    ) -> Footprint:
        """An estimate for one sequence of so many tokens, high rather than low.

        Args:
            experts_bytes: bytes that the experts of one layer take while they compute so many tokens.
            scores_of_two_widths: whether the device has no fused attention for heads of two widths (PyTorch on a CPU).
            chunk: of how many tokens the prompt is read at a time; None for all.
            captures: whether decode steps are captured, in memory that nothing else gets.
        """
        kv_bytes = self.kv_bytes(context)
        # A window's cache is cut to its size by the token after the prompt; until then it holds the whole prompt.
        uncut_bytes = sum(replace(cache, window=None).n_bytes(context) for cache in self.caches) - kv_bytes
        longer_bytes = max(cache.token_bytes * context // cache.stride for cache in self.caches)  # one, being extended
        score_heads = self.heads if scores_of_two_widths and not self.one_width else self.score_heads

        def activation_bytes(tokens: int) -> int:
            numbers = tokens * (9 * self.hidden * self.streams + 5 * self.heads_width + 3 * self.inner)
            norms = 8 * tokens * self.hidden * self.streams  # in float32
            scores = tokens * context * (score_heads * max(4 * self.item_bytes, 10) + self.masks * self.item_bytes)
            attention = self.item_bytes * (numbers + context * self.expanded) + norms + scores + longer_bytes
            experts = experts_bytes(tokens) + 2 * 4 * tokens * self.hidden  # and the sums of device and CPU
            beside = tokens * (self.item_bytes * self.hidden * self.streams + 4 * self.linear)
            return beside + max(attention, experts) + _LOGIT_BYTES * self.vocabulary + uncut_bytes

        if chunk is None or chunk >= context:
            prefill_bytes = activation_bytes(context)
        else:  # a later chunk has a mask, of bools and of numbers, and a cache that is made longer
            masks = chunk * context * (2 + self.item_bytes)
            prefill_bytes = activation_bytes(chunk) + masks + longer_bytes
        captured_bytes = 0
        if captures:
            kept = kept_by_captures(self.hidden, self.vocabulary, self.item_bytes)
            captured_bytes = activation_bytes(MOST_CAPTURED) + experts_bytes(MOST_CAPTURED) + kept
        return Footprint(context, kv_bytes, prefill_bytes, activation_bytes(1), captured_bytes, measured=False)


def kept_by_captures(hidden: int, vocabulary: int, item_bytes: int) -> int:
    """Bytes that captured steps keep between replays: their logits, and two ports with hidden states and a sum."""
    return KEPT_TOKENS * (vocabulary * item_bytes + 2 * hidden * (item_bytes + 4))


def expert_workspace(spec: ModelSpec) -> Callable[[int], int]:
    """By tokens, the bytes that a device takes for any number of a layer's experts, each unpacked to float32 first."""

    def n_bytes(tokens: int) -> int:
        rows = min(tokens, TOKENS_AT_ONCE)
        return max(_unpacked_bytes(of) + 4 * rows * (7 * of.neurons + 4 * of.hidden) for of in spec.layers)

    return n_bytes


def _unpacked_bytes(of: LayerSpec) -> int:
    """Of one expert: its matrices, and what they are made from; in whole blocks."""
    return 4 * 2 * of.matrices * -(-of.neurons // of.block) * of.block * of.hidden


def text_shape(config: Mapping[str, Any], item_bytes: int | None = None) -> TextShape:
    """The numbers of a config.json, also of one around a text model with images or sound.

    What a config leaves out is taken as most families have it: heads that divide the width, as many key heads as
    query heads, full attention. No family's own defaults are known here.

    Args:
        item_bytes: of the dtype that activations and the cache are in; None for the config's own.
    """
    values = _text_part(config)
    most = _Most(values)
    width, heads = most("hidden_size"), most("num_attention_heads") or 1
    is_latent = most("kv_lora_rank") > 0
    head = most("qk_nope_head_dim") + most("qk_rope_head_dim") if is_latent else most("head_dim") or width // heads
    value = most("v_head_dim") or head
    if item_bytes is None:
        dtype = str(values.get("dtype") or values.get("torch_dtype"))
        item_bytes = _ITEM_BYTES.get(dtype.removeprefix("torch."), 4)
    kinds = _layer_kinds(values)
    each = values.get("per_layer_config") or {}
    caches = [_caches({**values, **each.get(str(i), {})}, kind, head, item_bytes) for i, kind in enumerate(kinds)]
    widest = max(head, value, most("global_head_dim"), *(_Most(of)("head_dim") for of in each.values()))
    is_plain = values.get("model_type") in PLAIN_ATTENTION
    score_heads = heads if is_plain or any("minimax_m3" in kind for kind in kinds) else 0
    if any("indexed" in kind or "compressed" in kind for kind in kinds):
        score_heads += most("index_n_heads", "indexer_n_heads")
    return TextShape(
        context=context_of(values),
        caches=tuple(cache for of_layer in caches for cache in of_layer),
        item_bytes=item_bytes,
        hidden=width,
        heads=heads,
        heads_width=heads * widest,
        expanded=2 * heads * (head + value) if is_latent else 2 * heads * widest if is_plain else 0,
        inner=most("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
        streams=most("hc_mult", "hc_count") or 1,
        linear=_linear_numbers(values) if _STATES & set(kinds) else 0,
        score_heads=score_heads,
        masks=3 if any("sliding" in kind or "compressed" in kind for kind in kinds) else 0,
        one_width=head == value,
        vocabulary=most("vocab_size"),
    )


def has_fused_attention(config: Mapping[str, Any]) -> bool:
    """Whether the CPU's own kernels compute the attention of a model; else Transformers' operations in torch do."""
    return _text_part(config).get("model_type") in FUSED_ATTENTION


def context_of(values: Mapping[str, Any]) -> int | None:
    """The most tokens of prompt and answer together that a text model was made for; None where no length is named.

    Every kind of RoPE scaling stretches the length that it was trained with, `original_max_position_embeddings`, by
    its `factor`. Some checkpoints write the stretched length into `max_position_embeddings`, some leave it as it was,
    so the context is the longer of the two.
    """
    named: int | None = values.get("max_position_embeddings")
    if not named:
        return None
    lengths = [named]
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for rope in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or named
        if factor and rope.get("rope_type", rope.get("type")) != "default":  # which knows no factor
            lengths.append(int(original * factor))
    return max(lengths)


class _Most:
    """The largest whole number that a config has under some names; 0 where it has none."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __call__(self, *names: str) -> int:
        return max((self._values[name] for name in names if isinstance(self._values.get(name), int)), default=0)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = next((config[name] for name in _TEXT_PARTS if isinstance(config.get(name), Mapping)), None)
    if inner is None:
        return config
    outer = {name: config[name] for name in ("dtype", "torch_dtype") if config.get(name) is not None}
    return _text_part({**outer, **{name: value for name, value in inner.items() if value is not None}})


# What a kind of layer keeps besides, or in the place of, keys and values.
_STATES = frozenset(("linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"))
_KERNELS = (
    *("linear_conv_kernel_dim", "short_conv_kernel_size", "conv_kernel", "conv_kernel_size", "mamba_d_conv"),
    *("conv_L_cache", "cca_time0"),
)
_KEEPS_NOTHING = frozenset(("moe", "mlp"))


def _layer_kinds(values: Mapping[str, Any]) -> list[str]:
    """Of each layer that has a cache of its own; the last layers of some families share those before them."""
    most = _Most(values)
    kinds = values.get("layer_types") or values.get("layers_block_type")
    if kinds is None:
        count = most("num_hidden_layers")
        every = most("attn_layer_period", "full_attention_interval")
        offset = most("attn_layer_offset") if "attn_layer_offset" in values else every - 1
        # A window that only some layers have, in a pattern that is not written out, is taken for none.
        some = any("pattern" in name or "every_n" in name or name == "max_window_layers" for name in values)
        windowed = most("sliding_window") and values.get("use_sliding_window", True) and not some
        whole = "sliding_attention" if windowed else "full_attention"
        kinds = ["linear_attention" if every and i % every != offset else whole for i in range(count)]
    return list(kinds[: len(kinds) - most("num_kv_shared_layers")])


def _caches(values: Mapping[str, Any], kind: str, head: int, item_bytes: int) -> list[KeptCache]:
    """What a layer of a kind keeps; `head` is the width of a key where the config has no `head_dim`."""
    if kind in _KEEPS_NOTHING:
        return []
    kept = []
    if kind in _STATES:
        channels, state = _state_sizes(values)
        state_bytes = 4 * state if kind in ("linear_attention", "mamba") else 0  # which is kept in float32
        kept.append(KeptCache(fixed_bytes=item_bytes * channels * _Most(values)(*_KERNELS) + state_bytes))
        if not kind.startswith("hybrid"):
            return kept
    windowed = "sliding" in kind or "compressed" in kind
    prefix = "swa_" if windowed else "global_"  # of what a config says of one kind of layer alone
    own = {name.replace(prefix, ""): value for name, value in values.items() if prefix in name and value is not None}
    of = _Most({**values, **own})
    if latent := of("kv_lora_rank"):
        numbers = latent + of("qk_rope_head_dim")
    else:
        key, key_heads = of("head_dim") or head, of("num_key_value_heads") or of("num_attention_heads")
        if windowed and values.get("model_type") == "mimo_v2_flash":  # its layers with a window have twice as many
            key_heads *= 2
        numbers = key_heads * (key + (of("v_head_dim") or key))
    index = of("index_head_dim", "indexer_head_dim")
    if "indexed" in kind or "minimax_m3" in kind:
        numbers += index
    window = of("sliding_window", "sliding_window_size") if windowed and not kind.startswith("reference") else None
    # Layers with a window keep its length as a tensor of an int64.
    kept.append(KeptCache(item_bytes * numbers, window or None, 8 if windowed else 0))
    if "compressed" in kind:
        rate, entry = (values.get("compress_rates") or {}).get(kind, 1), item_bytes * (of("head_dim") + index)
        kept.append(KeptCache(entry, None, 8 * rate * entry, rate))  # and those of the tokens not yet compressed
    return kept


def _state_sizes(values: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of a convolution and numbers of a recurrent state, at most, of linear attention or a state space."""
    most = _Most(values)
    heads = most("linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads")
    heads = heads or most("num_attention_heads")
    head = most("head_dim") or most("hidden_size") // max(1, most("num_attention_heads"))
    key = most("linear_key_head_dim", "linear_head_dim", "mamba_d_state", "ssm_state_size") or head
    value = most("linear_value_head_dim", "linear_head_dim", "mamba_d_head", "mamba_head_dim") or head
    groups = most("linear_num_key_heads", "n_groups", "mamba_n_groups") or heads
    inner = max(heads * value, most("mamba_expand") * most("hidden_size") if "attn_layer_period" in values else 0)
    return inner + 2 * groups * key, inner * key


def _linear_numbers(values: Mapping[str, Any]) -> int:
    """Float32 numbers that linear attention keeps of each token of a prompt, high rather than low.

    Of the 64 tokens of its chunk six numbers a head, or three of each channel where these decay apart; of a state
    space four states; of lightning attention the scores of its block.
    """
    most = _Most(values)
    channels, state = _state_sizes(values)
    chunk = 64 * max(6 * most("linear_num_value_heads"), 3 * most("linear_num_heads") * most("linear_head_dim"))
    is_state_space = any(name.startswith("mamba") for name in values)
    return 2 * channels + max(chunk, 4 * state * is_state_space, most("num_attention_heads") * most("block_size"))
