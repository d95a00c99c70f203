"""From a model's name to what weights it has: config and headers are read, here or on the hub by ranged requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError, ModelError, RequestError
from ...planning.expert_sizes import ExpertShape
from ...planning.formats import FLOATS
from ...planning.model_config import completed, families, text_of
from ...planning.options import DTYPES, ModelOptions
from ...planning.shapes import parts_of_shape, shape_named
from ...planning.spelling import spelled
from ..contents import indexed_names, read_config_json
from ..gguf_values import architecture_of, values_of
from ..headers import TensorHeader, prefix_of, read_header
from ..hub import Wanted, find_files, lacking_bytes
from ..packed.manifest import MANIFEST, REST_FILE, parse_manifest
from ..quantization import Quantization
from .found import DenseWeight, ExpertLayer, Survey
from .gguf import GgufHeaders, Shaped, sort_out_gguf
from .roles import Matrix, sort_out
from .stored import matrices_of

_AT_ONCE = 16  # headers
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as files name them: as torch does
_INDEX = "model.safetensors.index.json"


def survey(model: str | None, source: ModelOptions, *, transcode: bool = False) -> Survey:
    """What weights a model, or a random shape, has.

    Raises:
        MoestroError: no such model, its files are damaged, or Moestro does not run it; one line.
    """
    if (model is None) == (source.shape is None):
        raise RequestError(f"name one model: a folder, a hub id, demo, or {spelled('shape')} with random weights")
    if model is None:
        assert source.shape is not None
        return survey_shape(source.shape, source)
    wanted = find_files(model, source.revision)
    other = None if source.config is None else find_files(source.config, weights=False)
    return survey_files(wanted, source, other=other, transcode=transcode)


def survey_files(
    wanted: Wanted, source: ModelOptions, *, other: Wanted | None = None, transcode: bool = False
) -> Survey:
    """As `survey`, of files that were found. other: where the config is, if not among them."""
    if any(name.endswith(".bin") for name in wanted.weights):
        raise CheckpointError(
            f"{wanted.model} has its weights in pickles (.bin), whose sizes cannot be seen without loading"
        )
    names = [REST_FILE] if MANIFEST in wanted.sizes else wanted.weights
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        headers = list(pool.map(lambda name: read_header(wanted, name), names))
    if wanted.is_gguf:
        tensors = [tensor for header in headers for tensor in header.tensors]
        found = _gguf(wanted, headers[0].metadata, tensors, other, transcode)
    else:
        indexed, tensors = indexed_names(wanted), []
        for name, header in zip(names, headers, strict=True):
            before = prefix_of([tensor.name for tensor in header.tensors], indexed.get(name, ()))
            tensors += [replace(tensor, name=f"{before}{tensor.name}") for tensor in header.tensors]
        config = completed(read_config_json(other or wanted), wanted.model)
        make = _packed if MANIFEST in wanted.sizes else _safetensors
        found = make(wanted, config, tensors)
    weights_bytes = sum(wanted.sizes[name] for name in wanted.weights)
    found = replace(found, weights_bytes=weights_bytes, fetched_bytes=lacking_bytes(wanted))
    return _in_dtype(found, source)


def survey_shape(name: str, source: ModelOptions, layers: int | None = None) -> Survey:
    """What a random model of a real shape, cut to so many layers or with all, has in bfloat16."""
    parts, cut = parts_of_shape(name, layers), {} if layers is None else {"num_hidden_layers": layers}
    config = completed({**shape_named(name), **cut, "tie_word_embeddings": False})
    width, vocabulary = parts.hidden, config["vocab_size"]
    dense = [
        DenseWeight("embed_tokens.weight", vocabulary * width, (vocabulary, width), is_head=True, is_embedding=True),
        DenseWeight("lm_head.weight", vocabulary * width, (vocabulary, width), is_head=True),
        *(DenseWeight(f"{part}.weight", size[0] * size[1], size) for part, size in parts.linears.items()),
        DenseWeight("norms, routers and biases", parts.rest),
    ]
    layer = ExpertLayer(parts.experts, ExpertShape(width, parts.neurons, has_bias=parts.has_bias))
    found = Survey(name, "shape", config, "bfloat16", (layer,) * parts.moe_layers, tuple(dense))
    return _in_dtype(found, source)


def _in_dtype(found: Survey, source: ModelOptions) -> Survey:
    return found if source.dtype == "auto" else replace(found, dtype=DTYPES[source.dtype])


def _gguf(
    wanted: Wanted, metadata: Mapping[str, Any], tensors: list[TensorHeader], other: Wanted | None, transcode: bool
) -> Survey:
    file = GgufHeaders(metadata, {tensor.name: Shaped(tensor.shape) for tensor in tensors})
    architecture = architecture_of(file)
    config = completed(values_of(file) if other is None else read_config_json(other), wanted.model)
    depth = text_of(config)["num_hidden_layers"]
    layers, dense = sort_out_gguf(wanted.model, tensors, architecture, depth, transcode)
    return Survey(wanted.model, "GGUF", config, _stated(config) or "bfloat16", layers, dense, stored=True)


def _safetensors(wanted: Wanted, config: dict[str, Any], tensors: list[TensorHeader]) -> Survey:
    text = text_of(config)
    own = text.get("quantization_config") or config.get("quantization_config")
    quantization = Quantization.stated(wanted.model, own) if isinstance(own, Mapping) else Quantization()
    stored = bool(quantization.method) or any(tensor.name.endswith(".W_q") for tensor in tensors)
    family = families()[config["model_type"]]
    matrices = matrices_of(tensors, quantization, text)
    if not stored and (one := next((one for one in matrices if one.format), None)) is not None:
        raise ModelError(f"{wanted.model}: {one.name} is quantized, but the config.json says nothing of quantization")
    if stored:
        matrices = [replace(one, format=_file_format(one)) for one in matrices]
    layers, dense = sort_out(wanted.model, matrices, config, family, text)
    dtype = _stated(config) or ("bfloat16" if stored else _dtype_of_files(wanted, tensors))
    if not stored:
        layers = tuple(replace(layer, format=None) for layer in layers)
    return Survey(wanted.model, "safetensors", config, dtype, layers, dense, stored, quantization.method)


def _file_format(one: Matrix) -> str | None:
    """Of a quantized checkpoint's matrix: the format that it keeps, for floats that of its file."""
    return one.format or FLOATS.get(_DTYPES.get(one.dtype, ""))


def _packed(wanted: Wanted, config: dict[str, Any], tensors: list[TensorHeader]) -> Survey:
    manifest = parse_manifest(wanted.model, wanted.read(MANIFEST))
    layers = tuple(
        ExpertLayer(
            len(one.experts), ExpertShape(one.hidden, one.neurons, one.has_gate, one.has_bias), format=one.format
        )
        for one in manifest.layers
    )
    matrices = [Matrix(one.name.removesuffix(".weight"), one.shape, one.dtype, "weight") for one in tensors]
    family = families()[config["model_type"]]
    rest = [one for one in matrices if not one.name.startswith("moestro.")]
    marker = (
        Matrix("layers.0.experts.0.up_proj", (1, 1), "BF16"),
        Matrix("layers.0.experts.0.down_proj", (1, 1), "BF16"),
    )
    dense = [replace(one, size=None) for one in sort_out(wanted.model, (*rest, *marker), config, family, {})[1]]
    for one in manifest.dense:
        dense.append(DenseWeight(one.name, one.rows * one.columns, (one.rows, one.columns), 0, one.format))
    return Survey(
        wanted.model, "packed", config, manifest.dtype.removeprefix("torch."), layers, tuple(dense), stored=True
    )


def _stated(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config says."""
    text = text_of(config)
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    name = str(found).removeprefix("torch.") if found else None
    return name if name in FLOATS else None


def _dtype_of_files(wanted: Wanted, tensors: list[TensorHeader]) -> str:
    """The dtype that an index or else the first tensor says, as Transformers takes it."""
    if _INDEX in wanted.sizes and len(wanted.weights) > 1:
        found = json.loads(wanted.read(_INDEX)).get("metadata", {}).get("dtype")
        if found in FLOATS:
            return str(found)
    return next((_DTYPES[tensor.dtype] for tensor in tensors if tensor.dtype in _DTYPES), "float32")
