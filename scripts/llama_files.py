"""Write the files in tests/data/llama: small random models, quantized and evaluated by llama.cpp itself.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    python scripts/llama_files.py tests/data/llama

For each entry of FILES a random model is written in float32, with the tensors and metadata that llama.cpp's loader of
that architecture asks for. `llama_model_quantize` makes the quantized file. llama.cpp multiplies quantized weights with
activations that it rounds to 8 bits, so its logits of the quantized file would not be exact: the tensors are
dequantized by the gguf package into a float32 file, and llama.cpp evaluates that one, with a float32 cache.
expected.npz then holds, for each file: tokens [T] int32, their logits [T, vocabulary] float32, and the tokens that
llama.cpp appends one by one, each the most likely one.

Nothing of Moestro is used here: its reader and this writer share no code.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADS, VOCABULARY, USED = 4, 48, 2
PROMPT, APPENDED, CONTEXT = 24, 8, 64  # tokens
SURE = 0.02  # an appended token's lead over the next best, as a share of the largest logit

Shapes = dict[str, tuple[int, ...]]  # tensor -> outermost dimension first
Metadata = dict[str, Any]
Model = tuple[Metadata, Shapes]
Arrays = Mapping[str, NDArray[Any]]


# ---- the architectures: metadata without the architecture's name in front, and tensors ----


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model, and the parts that most architectures share. `at` is a layer's name, "blk.0"."""

    layers: int
    head: int  # rows of a head
    neurons: int  # of an expert
    width: int = 256  # 256 where the type has blocks of 256
    kv_heads: int = 2
    experts: int = 4

    def metadata(self, **more: Any) -> Metadata:
        found = {
            "block_count": self.layers,
            "context_length": 128,
            "embedding_length": self.width,
            "feed_forward_length": self.neurons,
            "attention.head_count": HEADS,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
            "rope.dimension_count": self.head,
            "expert_count": self.experts,
            "expert_used_count": USED,
            "vocab_size": VOCABULARY,
        }
        if self.head * HEADS != self.width:
            found |= {"attention.key_length": self.head, "attention.value_length": self.head}
        return found | {name.replace("__", "."): value for name, value in more.items()}

    def attention(self, at: str, biases: bool = False) -> Shapes:
        rows = {"q": HEADS * self.head, "k": self.kv_heads * self.head, "v": self.kv_heads * self.head}
        shapes: Shapes = {f"{at}.attn_{name}.weight": (count, self.width) for name, count in rows.items()}
        if biases:
            shapes |= {f"{at}.attn_{name}.bias": (count,) for name, count in rows.items()}
        return shapes | {f"{at}.attn_output.weight": (self.width, HEADS * self.head)} | self.norm(f"{at}.attn_norm")

    def norm(self, name: str) -> Shapes:
        return {f"{name}.weight": (self.width,)}

    def mixture(self, at: str) -> Shapes:
        return {
            f"{at}.ffn_gate_inp.weight": (self.experts, self.width),
            f"{at}.ffn_gate_exps.weight": (self.experts, self.neurons, self.width),
            f"{at}.ffn_up_exps.weight": (self.experts, self.neurons, self.width),
            f"{at}.ffn_down_exps.weight": (self.experts, self.width, self.neurons),
        }

    def mlp(self, at: str, neurons: int, suffix: str = "") -> Shapes:
        return {
            f"{at}.ffn_gate{suffix}.weight": (neurons, self.width),
            f"{at}.ffn_up{suffix}.weight": (neurons, self.width),
            f"{at}.ffn_down{suffix}.weight": (self.width, neurons),
        }

    def model(self, metadata: Metadata, layer: Callable[[str, int], Shapes]) -> Model:
        shapes: Shapes = {"token_embd.weight": (VOCABULARY, self.width)}
        for index in range(self.layers):
            shapes |= layer(f"blk.{index}", index)
        return metadata, shapes | self.norm("output_norm") | {"output.weight": (VOCABULARY, self.width)}


def _llama() -> Model:
    of = Sizes(2, 16, 64, experts=3)
    return of.model(of.metadata(), lambda at, _: of.attention(at) | of.norm(f"{at}.ffn_norm") | of.mixture(at))


def _qwen3moe() -> Model:
    of = Sizes(2, 16, 32, experts=3)

    def layer(at: str, _: int) -> Shapes:
        norms: Shapes = {f"{at}.attn_{name}_norm.weight": (of.head,) for name in "qk"}
        return of.attention(at) | norms | of.norm(f"{at}.ffn_norm") | of.mixture(at)

    sizes = {"expert_feed_forward_length": of.neurons, "feed_forward_length": 128}
    return of.model(of.metadata(rope__freq_base=1e6, **sizes), layer)


def _qwen2moe() -> Model:
    of = Sizes(2, 64, 32, kv_heads=1, experts=3)

    def layer(at: str, _: int) -> Shapes:
        shapes = of.attention(at, biases=True) | of.norm(f"{at}.ffn_norm") | of.mixture(at)
        return shapes | of.mlp(at, 32, "_shexp") | of.norm(f"{at}.ffn_gate_inp_shexp")

    sizes = {"expert_feed_forward_length": of.neurons, "expert_shared_feed_forward_length": 32}
    return of.model(of.metadata(**sizes), layer)


def _olmoe() -> Model:
    of = Sizes(2, 64, 32, kv_heads=HEADS, experts=3)

    def layer(at: str, _: int) -> Shapes:
        norms = of.norm(f"{at}.attn_q_norm") | of.norm(f"{at}.attn_k_norm") | of.norm(f"{at}.ffn_norm")
        return of.attention(at) | norms | of.mixture(at)

    return of.model(of.metadata(), layer)


def _yarn(factor: float, length: int, **more: Any) -> Metadata:
    found = {"type": "yarn", "factor": factor, "original_context_length": length} | more
    return {f"rope.scaling.{name}": value for name, value in found.items()}


def _deepseek(of: Sizes, is_v3: bool) -> Model:
    """V3 has sigmoids, groups of experts and normed weights; V2 has softmax."""
    rank, plain, value = 64, 32, 32
    metadata = of.metadata(attention__head_count_kv=1, feed_forward_length=64)
    metadata |= _yarn(4.0, 16, yarn_log_multiplier=0.1 if is_v3 else 0.0707)
    metadata |= {
        "leading_dense_block_count": 1,
        "attention.q_lora_rank": rank,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + of.head,
        "attention.value_length": rank,
        "attention.key_length_mla": plain + of.head,
        "attention.value_length_mla": value,
        "expert_feed_forward_length": of.neurons,
        "expert_shared_count": 2,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": is_v3,
        "expert_gating_func": 2 if is_v3 else 1,
    }
    if is_v3:
        metadata |= {"expert_group_count": 4, "expert_group_used_count": 2}

    def layer(at: str, index: int) -> Shapes:
        shapes: Shapes = of.norm(f"{at}.attn_norm") | {
            f"{at}.attn_q_a.weight": (rank, of.width),
            f"{at}.attn_q_a_norm.weight": (rank,),
            f"{at}.attn_q_b.weight": (HEADS * (plain + of.head), rank),
            f"{at}.attn_kv_a_mqa.weight": (rank + of.head, of.width),
            f"{at}.attn_kv_a_norm.weight": (rank,),
            f"{at}.attn_k_b.weight": (HEADS, rank, plain),
            f"{at}.attn_v_b.weight": (HEADS, value, rank),
            f"{at}.attn_output.weight": (of.width, HEADS * value),
        }
        shapes |= of.norm(f"{at}.ffn_norm")
        if index == 0:
            return shapes | of.mlp(at, 64)
        shapes |= of.mixture(at) | of.mlp(at, 2 * of.neurons, "_shexp")
        return shapes | ({f"{at}.exp_probs_b.bias": (of.experts,)} if is_v3 else {})

    return of.model(metadata, layer)


def _gpt_oss() -> Model:
    """llama.cpp rounds YaRN's two bounds to whole dimensions, the vendor does not: here they are whole."""
    of = Sizes(2, 32, 64, width=128)
    length, dimension = 128, 6  # the dimension that turns once in `length` positions
    base = (length / (2 * np.pi)) ** (of.head / 2 / (dimension - 1e-6))

    def layer(at: str, _: int) -> Shapes:
        shapes = of.attention(at, biases=True) | of.norm(f"{at}.post_attention_norm") | of.mixture(at)
        shapes |= {f"{at}.attn_output.bias": (of.width,), f"{at}.attn_sinks.weight": (HEADS,)}
        shapes |= {f"{at}.ffn_gate_inp.bias": (of.experts,), f"{at}.ffn_down_exps.bias": (of.experts, of.width)}
        return shapes | {f"{at}.ffn_{name}_exps.bias": (of.experts, of.neurons) for name in ("gate", "up")}

    sizes = {"attention.key_length": of.head, "attention.value_length": of.head, "attention.sliding_window": 8}
    sizes |= {"expert_feed_forward_length": of.neurons}
    return of.model(of.metadata(rope__freq_base=float(base), **sizes) | _yarn(32.0, length), layer)


def _granitemoe() -> Model:
    of = Sizes(2, 64, 32)

    def layer(at: str, _: int) -> Shapes:
        return of.attention(at) | of.norm(f"{at}.ffn_norm") | of.mixture(at) | of.mlp(at, 64, "_shexp")

    scales = {"embedding_scale": 4.0, "residual_scale": 0.5, "attention.scale": 0.1, "logit_scale": 3.0}
    return of.model(of.metadata(expert_shared_feed_forward_length=64, **scales), layer)


def _glm4moe() -> Model:
    of = Sizes(2, 64, 64, width=128)

    def layer(at: str, index: int) -> Shapes:
        shapes = of.attention(at, biases=True) | {f"{at}.attn_{name}_norm.weight": (of.head,) for name in "qk"}
        shapes |= of.norm(f"{at}.post_attention_norm")
        if index == 0:
            return shapes | of.mlp(at, 128)
        return shapes | of.mixture(at) | of.mlp(at, of.neurons, "_shexp") | {f"{at}.exp_probs_b.bias": (of.experts,)}

    found = of.metadata(rope__dimension_count=of.head // 2, feed_forward_length=128) | {
        "leading_dense_block_count": 1,
        "expert_feed_forward_length": of.neurons,
        "expert_shared_count": 1,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
    }
    return of.model(found, layer)


def _minimax_m2() -> Model:
    of = Sizes(2, 64, 32, width=128)

    def layer(at: str, _: int) -> Shapes:
        norms: Shapes = {f"{at}.attn_q_norm.weight": (HEADS * of.head,)}
        norms |= {f"{at}.attn_k_norm.weight": (of.kv_heads * of.head,)} | of.norm(f"{at}.ffn_norm")
        return of.attention(at) | norms | of.mixture(at) | {f"{at}.exp_probs_b.bias": (of.experts,)}

    sizes = {"rope.dimension_count": of.head // 2, "expert_feed_forward_length": of.neurons}
    return of.model(of.metadata(expert_gating_func=2, **sizes), layer)


# Name of the file -> architecture, model, and what llama.cpp makes of it.
FILES: dict[str, tuple[str, Callable[[], Model], str]] = {
    "mixtral-q5_k_m": ("llama", _llama, "Q5_K_M"),
    "qwen3moe-q6_k": ("qwen3moe", _qwen3moe, "Q6_K"),
    "qwen2moe-q4_k_m": ("qwen2moe", _qwen2moe, "Q4_K_M"),
    "olmoe-q3_k_m": ("olmoe", _olmoe, "Q3_K_M"),
    "deepseek3-iq4_xs": ("deepseek2", lambda: _deepseek(Sizes(2, 16, 32, experts=8), is_v3=True), "IQ4_XS"),
    "deepseek2-iq4_nl": ("deepseek2", lambda: _deepseek(Sizes(2, 16, 64, width=128), is_v3=False), "IQ4_NL"),
    "gpt-oss-mxfp4": ("gpt-oss", _gpt_oss, "MXFP4_MOE"),
    "granitemoe-q2_k": ("granitemoe", _granitemoe, "Q2_K"),
    "glm4moe-q4_0": ("glm4moe", _glm4moe, "Q4_0"),
    "minimax-m2-q8_0": ("minimax-m2", _minimax_m2, "Q8_0"),
}


# ---- files ----


def random_tensors(shapes: Shapes, seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Random float32 tensors; norms are not 1 and biases not 0, so that none of them can be left out unnoticed."""
    generator = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if "norm.weight" in name:
            values = 1 + 0.3 * values
        elif name.endswith(".bias"):
            values = 0.2 * values
        elif "gate_inp" in name:  # so that experts are chosen clearly
            values = values * 3 / shape[-1] ** 0.5
        elif "token_embd" not in name and "sinks" not in name:
            values = values * 1.5 / shape[-1] ** 0.5
        yield name, values.astype(np.float32)


def write_float32(path: Path, architecture: str, metadata: Metadata, tensors: Arrays) -> None:
    """Write a GGUF of float32 tensors and no vocabulary."""
    gguf: Any = import_module("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kinds: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds.get(type(value), writer.add_string)(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(path: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors of a GGUF as float32, by the gguf package."""
    gguf: Any = import_module("gguf")
    return {
        one.name: gguf.dequantize(one.data, one.tensor_type).reshape(tuple(int(size) for size in one.shape[::-1]))
        for one in gguf.GGUFReader(path).tensors
    }


def quantize(source: Path, target: Path, kind: str) -> None:
    """Let llama.cpp quantize a file."""
    llama: Any = import_module("llama_cpp")
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp could not make {target.name}")


# ---- llama.cpp's logits ----


class Reference:
    """A float32 file in llama.cpp, on the CPU, with a float32 cache."""

    def __init__(self, path: Path) -> None:
        self._llama: Any = import_module("llama_cpp")
        options = self._llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {path.name}")
        settings = self._llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = self._llama.GGML_TYPE_F32
        settings.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp could not make a context for {path.name}")

    def logits(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        """[T, vocabulary] of tokens that begin at a position."""
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position + index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.n_tokens = len(tokens)
        if self._llama.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        rows = [self._llama.llama_get_logits_ith(self._context, index) for index in range(len(tokens))]
        found = np.array([np.ctypeslib.as_array(row, (VOCABULARY,)) for row in rows], np.float32)
        self._llama.llama_batch_free(batch)
        return found


def expected(path: Path, tokens: list[int]) -> tuple[dict[str, NDArray[Any]], float]:
    """What llama.cpp computes of a float32 file, and the least lead of an appended token."""
    reference = Reference(path)
    logits = reference.logits(tokens, 0)
    last, appended, lead = logits[-1], [], np.inf
    for index in range(APPENDED):
        first, second = np.sort(last)[:-3:-1]
        lead = min(lead, float(first - second) / float(np.abs(logits).max()))
        appended.append(int(last.argmax()))
        last = reference.logits(appended[-1:], len(tokens) + index)[0]
    arrays = {"tokens": np.array(tokens, np.int32), "logits": logits, "appended": np.array(appended, np.int32)}
    return arrays, lead


def make(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """Write one quantized file; returns what is expected of it. Takes the first seed whose choices are clear."""
    architecture, build, kind = FILES[name]
    metadata, shapes = build()
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, PROMPT).tolist()
    target = folder / f"{name}.gguf"
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(100):
            floats = Path(scratch) / f"{seed}.gguf"
            write_float32(floats, architecture, metadata, dict(random_tensors(shapes, seed)))
            quantize(floats, target, kind)
            exact = Path(scratch) / f"{seed}-exact.gguf"
            write_float32(exact, architecture, metadata, dequantized(target))
            arrays, lead = expected(exact, tokens)
            if lead > SURE and len(set(arrays["appended"].tolist())) > APPENDED // 2:
                print(f"{name:20} seed {seed}, {target.stat().st_size / 1e3:.0f} kB, least lead {lead:.3f}")
                return arrays
    raise SystemExit(f"{name}: no seed of 100 gives clear choices")


def main() -> None:
    """Write all files, or those named after the folder."""
    folder, *names = sys.argv[1:]
    llama: Any = import_module("llama_cpp")
    quiet = llama.llama_log_callback(lambda level, text, _: print(text.decode(), end="") if level == 4 else None)
    llama.llama_log_set(quiet, None)
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = Path(folder) / "expected.npz"
    arrays: dict[str, Any] = dict(np.load(kept)) if kept.exists() else {}
    for name in names or FILES:
        arrays |= {f"{name}.{key}": value for key, value in make(Path(folder), name).items()}
    np.savez_compressed(kept, **arrays)


if __name__ == "__main__":
    main()
