"""llama.cpp as a rival: a random model of one of our shapes as a GGUF file, and a worker that times it.

The worker is a process of its own (see moestro.bench.worker) with the library of `llama-cpp-python` and no sampling:
`llama_decode` alone, on the CPU, with the library's defaults where they are not named here (f16 KV cache,
flash attention as it sees fit, weights repacked for this CPU where it can). Batches are of 512 tokens.

    CMAKE_ARGS="-DGGML_NATIVE=ON" CXXFLAGS="-fno-dse" pip install llama-cpp-python==0.3.36 gguf==0.19.0

The flag is for CPUs with AMX: GCC 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes it reads, so
that without the flag the others are never written, and Q8_0 and Q4_0 prompts end in a SIGSEGV.

    write_gguf(Path("olmoe-q4.gguf"), "olmoe-1b-7b", bits=4)
    with LlamaCpp(Path("olmoe-q4.gguf"), threads=2) as rival:
        prompt_s, token_s = rival.prefill_s(512), rival.decode_s(512, 32)
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.bench.worker import EngineWorker, Handlers, serve
from moestro.errors import RequestError
from moestro.planning.shapes import REAL_SHAPES, SHAPES, spec_of_shape

from . import installed
from .blocks import PACKINGS, POOL_BLOCKS, STD, random_blocks

BATCH = 512  # tokens, logical and physical
CONTEXT = 4096
WARMUP = 32  # tokens: enough for each of its kernels
EMBEDDING_STD = 1.0  # so that a token's own content, not its context, decides its route in every layer
ERROR_LEVEL = 4  # of llama.cpp's log
_WRITTEN = (*REAL_SHAPES, "tiny")


def available() -> str | None:
    """The version of llama-cpp-python, if it is installed."""
    return installed("llama_cpp", "llama-cpp-python")


# ---- the model ----


def write_gguf(path: Path, shape: str, bits: int, layers: int | None = None, seed: int = 0) -> None:
    """Write a random model of a shape in planning/shapes.py, about as fast as the disk writes.

    All matrices, embedding and head too, are BF16 (16 bits), Q8_0 (8) or Q4_0 (4), cut from one repeated
    pool at random places; norms are 1. Routers are random float32, so a token's experts depend on its
    hidden state and all experts are used, about evenly. There is no vocabulary: tokens are numbers only.

    Raises:
        RequestError: the gguf package is missing, or there is no such shape or number of bits.
    """
    if installed("gguf", "gguf") is None:
        raise RequestError("writing a GGUF needs the gguf package; pip install gguf")
    if shape not in _WRITTEN or bits not in PACKINGS or (layers is not None and layers < 1):
        known = f"shapes: {', '.join(_WRITTEN)}; bits: 16, 8, 4; layers: 1 or more"
        raise RequestError(f"no GGUF of {shape} with {bits} bits and {layers or 'no'} layers; {known}")
    gguf: Any = import_module("gguf")
    part = path.with_name(path.name + ".part")
    writer = describe_model(gguf, part, shape, PACKINGS[bits].name, layers)
    tensors = list(tensors_of(shape, layers))
    matrix_type = gguf.GGMLQuantizationType[PACKINGS[bits].name]
    try:
        for name, dimensions in tensors:
            size = _tensor_bytes(name, dimensions, bits)
            plain = is_float32(name)
            dtype = np.dtype(np.float32)  # what is stored is said by raw_dtype
            raw_type = gguf.GGMLQuantizationType.F32 if plain else matrix_type
            writer.add_tensor_info(name, dimensions, dtype, size, raw_dtype=raw_type)
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in _contents(tensors, bits, seed):
            writer.write_tensor_data(data)
        writer.close()
        part.replace(path)
    finally:
        with suppress(OSError):
            writer.close()
        part.unlink(missing_ok=True)


def describe_model(gguf: Any, path: Path, shape: str, kind: str, layers: int | None) -> Any:
    """The gguf package's writer with the metadata of a shape; kind: as in the package's MOSTLY_<kind>."""
    config = SHAPES[shape]
    writer = gguf.GGUFWriter(path, {"mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(config["model_type"], "olmoe"))
    head_dim = _head_dim(config)
    writer.add_block_count(layers or config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_parameters", {}).get("rope_theta", 1e4))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(spec_of_shape(shape).layers[0].experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    return writer


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def tensors_of(shape: str, layers: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and dimensions of each tensor, the longest stride first (llama.cpp prints them the other way round)."""
    config = SHAPES[shape]
    hidden, vocabulary, layer_spec = config["hidden_size"], config["vocab_size"], spec_of_shape(shape).layers[0]
    experts, neurons = layer_spec.experts, layer_spec.neurons
    head_dim = _head_dim(config)
    q_rows, kv_rows = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]
    # olmoe norms all heads of a token together, qwen3 each head, mixtral none.
    norms = {"olmoe": (q_rows, kv_rows), "qwen3_moe": (head_dim, head_dim)}.get(config["model_type"])
    yield "token_embd.weight", (vocabulary, hidden)
    for layer in range(layers or config["num_hidden_layers"]):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,)
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            yield f"{block}.attn_{name}.weight", (rows, hidden)
        yield f"{block}.attn_output.weight", (hidden, q_rows)
        if norms:
            yield f"{block}.attn_q_norm.weight", (norms[0],)
            yield f"{block}.attn_k_norm.weight", (norms[1],)
        yield f"{block}.ffn_norm.weight", (hidden,)
        yield f"{block}.ffn_gate_inp.weight", (experts, hidden)
        for name in ("gate", "up"):
            yield f"{block}.ffn_{name}_exps.weight", (experts, neurons, hidden)
        yield f"{block}.ffn_down_exps.weight", (experts, hidden, neurons)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (vocabulary, hidden)


def is_float32(name: str) -> bool:
    """Whether a tensor of that name is not quantized."""
    return "norm" in name or "gate_inp" in name


def _tensor_bytes(name: str, dimensions: tuple[int, ...], bits: int) -> int:
    count = int(np.prod(dimensions, dtype=np.int64))
    return count * 4 if is_float32(name) else count // PACKINGS[bits].values * PACKINGS[bits].block_bytes


def _contents(tensors: list[tuple[str, tuple[int, ...]]], bits: int, seed: int) -> Iterator[NDArray[Any]]:
    """The tensors' data in their order. Takes the RAM of the embedding, then that of the largest other tensor."""
    generator = np.random.default_rng(seed)
    block_bytes = PACKINGS[bits].block_bytes
    (name, dimensions), *others = tensors
    size = _tensor_bytes(name, dimensions, bits)
    yield random_blocks(bits, size, seed, EMBEDDING_STD)[:size]
    largest = max(_tensor_bytes(*tensor, bits) for tensor in others)
    pool = random_blocks(bits, largest + POOL_BLOCKS[bits] * block_bytes, seed + 1)
    for name, dimensions in others:
        if "norm" in name:
            yield np.ones(dimensions, np.float32)
        elif is_float32(name):
            yield generator.standard_normal(dimensions, dtype=np.float32) * np.float32(STD)
        else:
            start = int(generator.integers(POOL_BLOCKS[bits])) * block_bytes
            yield pool[start : start + _tensor_bytes(name, dimensions, bits)]


# ---- the worker ----


class LlamaCpp(EngineWorker):
    """llama.cpp with a model loaded, in its own process."""

    def __init__(self, path: Path, threads: int, *, context: int = CONTEXT, sequences: int = 1) -> None:
        if available() is None:
            raise RequestError("llama.cpp is not installed; pip install llama-cpp-python")
        super().__init__("benchmarks.rivals.llama_cpp", [str(path), *map(str, (threads, context, sequences))])

    def together(self, sequences: int, prompt: int, answer: int) -> tuple[float, float]:
        """Seconds to read a prompt of each sequence, in batches of all, and of steps of a token of each."""
        prompt_s, decode_s = self.ask("together", sequences=sequences, prompt=prompt, answer=answer)
        return float(prompt_s), float(decode_s)


class Engine:
    """The model that the worker times, through the library's own calls."""

    def __init__(self, path: str, threads: int, context: int, sequences: int = 1) -> None:
        self._api: Any = import_module("llama_cpp")
        self._complaint = "it did not say why"
        self._listener = self._api.llama_log_callback(self._listen)  # kept: C may call it until the process ends
        self._api.llama_log_set(self._listener, None)
        self._api.llama_backend_init()
        model_options = self._api.llama_model_default_params()
        # Not mapped: weights of a mapped file could be dropped when other engines read theirs.
        _set(model_options, n_gpu_layers=0, load_mode=self._api.LLAMA_LOAD_MODE_NONE)
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), model_options)
        if not self._model:
            raise RequestError(f"could not load {Path(path).name}: {self._complaint}")
        options = self._api.llama_context_default_params()
        _set(options, n_ctx=context, n_seq_max=sequences, n_batch=BATCH, n_ubatch=BATCH)
        _set(options, n_threads=threads, n_threads_batch=threads, offload_kqv=False, op_offload=False)
        self._context = self._api.llama_init_from_model(self._model, options)
        if not self._context:
            raise RequestError(f"no context of {context} tokens: {self._complaint}")
        self._memory = self._api.llama_get_memory(self._context)
        self._vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self._context_tokens, self._cached_tokens = context, 0
        self._random = random.Random(0)
        self.decode_s(min(WARMUP, context - 1), 1)

    def prefill_s(self, tokens: int) -> float:
        self._check(tokens)
        self._api.llama_memory_clear(self._memory, False)
        self._cached_tokens = 0
        return self._decode([min(BATCH, tokens - done) for done in range(0, tokens, BATCH)])

    def decode_s(self, context: int, tokens: int) -> float:
        self._check(context, tokens)
        if context > self._cached_tokens or not self._api.llama_memory_seq_rm(self._memory, 0, context, -1):
            self.prefill_s(context)
        self._cached_tokens = context
        return self._decode([1] * tokens) / tokens

    def together(self, sequences: int, prompt: int, answer: int) -> tuple[float, float]:
        """As `LlamaCpp.together`; each sequence has as much of the context as all others."""
        self._api.llama_memory_clear(self._memory, False)
        self._cached_tokens = 0
        begin_s = perf_counter()
        places = [(sequence, at) for sequence in range(sequences) for at in range(prompt)]
        for first in range(0, len(places), BATCH):
            part = places[first : first + BATCH]
            self._decode_places([(sequence, at, at == prompt - 1) for sequence, at in part])
        prompt_s = perf_counter() - begin_s
        for at in range(prompt, prompt + answer - 1):
            self._decode_places([(sequence, at, True) for sequence in range(sequences)])
        decode_s = perf_counter() - begin_s - prompt_s
        self._api.llama_memory_clear(self._memory, False)
        return prompt_s, decode_s

    def _decode_places(self, places: Sequence[tuple[int, int, bool]]) -> None:
        """A batch of random tokens: of each the sequence, the position, and whether its logits are wanted."""
        batch = self._api.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for index, (sequence, at, has_logits) in enumerate(places):
                batch.token[index], batch.pos[index] = self._random.randrange(self._vocabulary), at
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = has_logits
            status = self._api.llama_decode(self._context, batch)
            if status:
                raise RequestError(f"llama_decode of {len(places)} tokens returned {status}: {self._complaint}")
            self._api.llama_synchronize(self._context)
        finally:
            self._api.llama_batch_free(batch)

    def card(self) -> dict[str, Any]:
        """The library's version and what it uses of this CPU."""
        system = self._api.llama_print_system_info().decode().strip(" |")
        return {"version": available(), "system": system}

    def _decode(self, counts: Sequence[int]) -> float:
        """Seconds of random batches of these sizes, one after the other."""
        draw = self._random.randrange
        batches = [(self._api.llama_token * n)(*(draw(self._vocabulary) for _ in range(n))) for n in counts]
        start_s = perf_counter()
        for tokens, count in zip(batches, counts, strict=True):
            status = self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, count))
            if status:
                raise RequestError(f"llama_decode of {count} tokens returned {status}: {self._complaint}")
            self._cached_tokens += count
        self._api.llama_synchronize(self._context)
        return perf_counter() - start_s

    def _check(self, *tokens: int) -> None:
        if min(tokens) < 1 or sum(tokens) > self._context_tokens:
            raise RequestError(
                f"{' + '.join(map(str, tokens))} tokens; the context was made for 1 to {self._context_tokens}"
            )

    def _listen(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").strip()
        if level == ERROR_LEVEL and line:
            self._complaint = line
            print(line, file=sys.stderr, flush=True)


def _set(options: Any, **values: Any) -> None:
    for name, value in values.items():
        if not hasattr(options, name):  # ctypes would accept the name and ignore it
            raise RequestError(f"llama-cpp-python {available()} has no option {name}; install 0.3.36")
        setattr(options, name, value)


@contextmanager
def random_model(shape: str, bits: int, layers: int, threads: int) -> Iterator[LlamaCpp]:
    """A worker with a random model of a shape; the model's file is removed once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, shape, bits, layers)
        worker = LlamaCpp(path, threads)
    with worker:
        yield worker


def main() -> None:
    """`python -m benchmarks.rivals.llama_cpp GGUF THREADS CONTEXT SEQUENCES`: the worker's end of the pipe."""

    def start() -> tuple[dict[str, Any], Handlers]:
        path, *numbers = sys.argv[1:]
        engine = Engine(path, *map(int, numbers))
        handlers: Handlers = {"prefill_s": engine.prefill_s, "decode_s": engine.decode_s}
        return engine.card(), {**handlers, "together": engine.together}

    serve(start)


if __name__ == "__main__":
    main()
