"""What a checkpoint is, by its config and headers alone: architecture, and format, bits and bytes of each part.

Reads no weight; on the hub some hundred KB by ranged requests. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import CheckpointError, first_line
from .choose import has_tokenizer
from .gguf_header import TRANSCODED
from .headers import TensorHeader, prefix_of, read_header
from .hub import Wanted, find_files
from .packed.manifest import MANIFEST, REST_FILE, parse_manifest

_AT_ONCE = 16  # headers
_INDEX = "model.safetensors.index.json"
_PARTS = (  # the first that a tensor's name fits
    ("shared experts", r"shared_?expert|shared_mlp|share_expert|_shexp"),
    ("router and norms", r"norm|router|gate_inp|mlp\.gate\.|moe\.gate\.|ffn\.gate\.|exp_probs|score_correction"),
    ("experts", r"experts?\b|_exps\b|ffn_(gate|up|down)\.\d+\.|moe\.(in|out)put_linear"),
    ("embeddings", r"embed_tokens|embed_in|embeddings|token_embd|\bwte\b|\bembed\."),
    ("head", r"lm_head|embed_out|^(model\.)?(output|head)\.weight"),
    ("attention", r"attn|attention|mamba|ssm|mixer"),
    ("dense layers", r"mlp|ffn|feed_forward|moe"),
    ("others", ""),
)
_PARTS_ORDER = ("experts", "shared experts", "attention", "dense layers", "router and norms", "embeddings", "head")
# What stands beside packed weights: scales, zeros, orders, shapes.
_BESIDE = re.compile(
    r"(scales?|scale_inv|weight_scale_2|qzeros|zero_point|g_idx|weight_shape|input_scale|absmax|quant_map)$"
)
_PACKED = re.compile(r"(qweight|weight_packed|blocks|\.weight|_proj|\.w\d)$")


@dataclass
class Part:
    """Weights that have the same purpose: their number, their bytes with scales, and the bytes of each format."""

    weights: int = 0
    n_bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits of a weight, scales included."""
        return 8 * self.n_bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Contents:
    """What `moestro inspect` says of a model. None or 0 is what its files do not say."""

    model: str
    kind: str  # "safetensors", "GGUF" or "packed"
    architecture: str
    layers: int
    experts: int
    experts_per_token: int
    context: int
    tokenizer: bool
    quantization: str | None
    n_files: int
    n_bytes: int  # of the weights' files
    parts: Mapping[str, Part]
    transcode: tuple[str, ...] = ()  # formats that only --transcode 8 loads

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, with the bits of each part."""
        parts = {name: {**asdict(part), "bits": round(part.bits, 3)} for name, part in self.parts.items()}
        return {**asdict(self), "parts": parts}


def inspect_model(model: str, revision: str | None = None) -> Contents:
    """Read what a model is, by its config and the headers of its files.

    Raises:
        MoestroError: no such model, or its files are damaged; one line.
    """
    wanted = find_files(model, revision)
    if MANIFEST in wanted.sizes:
        return _packed(wanted)
    if any(name.endswith(".bin") for name in wanted.weights):
        raise CheckpointError(
            f"{model} has its weights in pickles (.bin), whose contents cannot be seen without loading"
        )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        headers = list(pool.map(lambda name: read_header(wanted, name), wanted.weights))
    if wanted.is_gguf:
        return _gguf(wanted, headers[0].metadata, [tensor for header in headers for tensor in header.tensors])
    indexed, tensors = indexed_names(wanted), list[TensorHeader]()
    for name, header in zip(wanted.weights, headers, strict=True):
        before = prefix_of([tensor.name for tensor in header.tensors], indexed.get(name, ()))
        tensors += [replace(tensor, name=f"{before}{tensor.name}") for tensor in header.tensors]
    return _safetensors(wanted, tensors)


def indexed_names(wanted: Wanted) -> dict[str, list[str]]:
    """The names that the index of several files has for each, from which they were chosen; none without one."""
    files: dict[str, list[str]] = {}
    if len(wanted.weights) > 1 and _INDEX in wanted.sizes:
        for name, file in json.loads(wanted.read(_INDEX))["weight_map"].items():
            files.setdefault(file, []).append(name)
    return files


def _gguf(wanted: Wanted, metadata: Mapping[str, Any], tensors: Iterable[TensorHeader]) -> Contents:
    architecture = str(metadata.get("general.architecture", "unknown"))

    def number(name: str) -> int:
        return _whole(metadata.get(f"{architecture}.{name}"))

    parts = _by_part((tensor, math.prod(tensor.shape), tensor.dtype) for tensor in tensors)
    return Contents(
        model=wanted.model,
        kind="GGUF",
        architecture=architecture,
        layers=number("block_count"),
        experts=number("expert_count"),
        experts_per_token=number("expert_used_count"),
        context=number("context_length"),
        tokenizer="tokenizer.ggml.tokens" in metadata,
        quantization=None,
        n_files=len(wanted.weights),
        n_bytes=sum(wanted.sizes[name] for name in wanted.weights),
        parts=parts,
        transcode=tuple(sorted({kind for part in parts.values() for kind in part.formats} & set(TRANSCODED))),
    )


def _safetensors(wanted: Wanted, tensors: Collection[TensorHeader]) -> Contents:
    text = _config(wanted)[1]
    quantized = text.get("quantization_config")
    quantized = quantized if isinstance(quantized, dict) else {}
    method = str(quantized.get("quant_method") or quantized.get("quant_algo") or "").lower()
    bits = _packed_bits(quantized)
    if any(tensor.name.endswith(".W_q") for tensor in tensors):
        return _by_config(wanted, _by_part((tensor, *_hqq_weights(tensor, text)) for tensor in tensors), "hqq")
    return _by_config(wanted, _by_part((tensor, *_weights(tensor, method, bits)) for tensor in tensors), method)


def _packed(wanted: Wanted) -> Contents:
    """Of a packed folder, by its moestro.json and the header of what is not packed."""
    manifest = parse_manifest(wanted.model, wanted.read(MANIFEST))
    rest = [one for one in read_header(wanted, REST_FILE).tensors if not one.name.startswith("moestro.")]
    found = [(one, math.prod(one.shape), one.dtype) for one in rest]
    for one in manifest.dense:
        size = one.rows, one.columns
        found.append((TensorHeader(one.name, one.format, size, one.run.n_bytes), math.prod(size), one.format))
    for layer in manifest.layers:
        n_bytes = sum(run.n_bytes for run in layer.experts)
        header = TensorHeader(f"{layer.module}.experts", layer.format, (), n_bytes)
        found.append((header, layer.weights, layer.format))
    return _by_config(wanted, _by_part(found))


def read_config_json(wanted: Wanted) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: there is none that can be read.
    """
    if "config.json" not in wanted.sizes:
        raise CheckpointError(f"{wanted.model} has no config.json; name the folder of a Hugging Face checkpoint")
    try:
        return dict(json.loads(wanted.read("config.json")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{wanted.model}: its config.json cannot be read ({first_line(error)})") from error


def _config(wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's config.json, and what it says of the text model."""
    config = read_config_json(wanted)
    text = config.get("text_config")
    return config, {**config, **text} if isinstance(text, dict) else config


def _by_config(wanted: Wanted, parts: Mapping[str, Part], method: str = "") -> Contents:
    """The contents of a folder with a config.json. method: by which its weights are quantized."""
    config, text = _config(wanted)

    def number(*names: str) -> int:
        return next((found for name in names if (found := _whole(text.get(name)))), 0)

    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else str(config.get("model_type", "unknown"))
    return Contents(
        model=wanted.model,
        kind="packed" if MANIFEST in wanted.sizes else "safetensors",
        architecture=architecture,
        layers=number("num_hidden_layers", "n_layer", "num_layers"),
        experts=number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        experts_per_token=number("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"),
        context=number("max_position_embeddings", "n_positions", "max_sequence_length"),
        tokenizer=has_tokenizer(wanted.sizes),
        quantization=method or None,
        n_files=len(wanted.weights),
        n_bytes=sum(wanted.sizes[name] for name in wanted.weights),
        parts=parts,
    )


def _whole(value: Any) -> int:
    """A number of a config; of a list, one for each layer, the largest."""
    if isinstance(value, list):
        return max(map(_whole, value), default=0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _packed_bits(quantized: Mapping[str, Any]) -> int:
    """Bits of a weight in 32-bit words."""
    groups = quantized.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    found = weights.get("num_bits") if isinstance(weights, dict) else quantized.get("bits", quantized.get("w_bit"))
    return found if found in (2, 3, 4, 8) else 4


def _weights(tensor: TensorHeader, method: str, bits: int) -> tuple[int, str]:
    """How many weights a tensor of a safetensors file holds, and in which format; 0 where it is scales or the like."""
    count, dtype = math.prod(tensor.shape), tensor.dtype
    if not method:
        return count, dtype
    if _BESIDE.search(tensor.name):
        return 0, ""
    if _PACKED.search(tensor.name):
        if dtype == "I32":
            return count * 32 // bits, f"{method} int{bits}"
        if dtype == "U8" or (dtype == "I8" and method == "fp8"):  # two weights of 4 bits a byte
            return 2 * count, method if method != "fp8" else "fp4"
    return count, dtype


def _hqq_weights(tensor: TensorHeader, text: Mapping[str, Any]) -> tuple[int, str]:
    """As `_weights`, of mixtral-offloading's form, in which a matrix's size stands in the config alone."""
    if ".meta." in tensor.name:
        return 0, ""
    if not tensor.name.endswith(".W_q"):
        return math.prod(tensor.shape), tensor.dtype
    hidden, heads = _whole(text.get("hidden_size")), _whole(text.get("num_attention_heads"))
    width = _whole(text.get("head_dim")) or hidden // max(heads, 1)
    if ".experts." in tensor.name:
        count = hidden * _whole(text.get("intermediate_size"))
    elif re.search(r"\.[kv]_proj\.", tensor.name):
        count = hidden * width * (_whole(text.get("num_key_value_heads")) or heads)
    else:
        count = hidden * width * heads
    bits = 3 if tensor.dtype == "I32" else 8 * tensor.n_bytes // max(count, 1)  # ten of 3 bits in a word
    return count, f"hqq int{bits}"


def _by_part(tensors: Iterable[tuple[TensorHeader, int, str]]) -> dict[str, Part]:
    """Sums of (tensor, number of weights, format); the bytes of scales are of no format."""
    parts: dict[str, Part] = {}
    for tensor, weights, kind in tensors:
        name = next(name for name, pattern in _PARTS if re.search(pattern, tensor.name, re.IGNORECASE))
        part = parts.setdefault(name, Part())
        part.weights += weights
        part.n_bytes += tensor.n_bytes
        if kind:
            part.formats[kind] = part.formats.get(kind, 0) + tensor.n_bytes
    order = [*_PARTS_ORDER, "others"]
    return {name: parts[name] for name in sorted(parts, key=order.index)}
