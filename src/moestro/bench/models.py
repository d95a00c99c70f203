"""The worker of `moestro bench decode`: a random model of a real shape, by Moestro or by Transformers alone.

    python -m moestro.bench.models ENGINE SHAPE BITS LAYERS THREADS [EXPERT_BITS]

BITS is a number or the form of a checkpoint, like q4_k_m. With EXPERT_BITS, it is that of the dense layers, and
embedding and head have 16. The worker answers by the protocol of worker.py, and times forward passes with a cache and
random tokens; it does not sample.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from statistics import fmean
from time import perf_counter
from typing import Any

from ..errors import RequestError
from .worker import EngineWorker, Handlers, serve

OURS, ALONE = "moestro", "transformers"


class ModelWorker(EngineWorker):
    """A model in its own process.

    Args:
        engine: "moestro" or "transformers" (alone, in bfloat16).
        bits: of all weights, or a checkpoint's form. With `expert_bits`, of the dense layers alone.
        python: its interpreter.
    """

    def __init__(
        self,
        engine: str,
        shape: str,
        *,
        bits: int | str,
        layers: int,
        threads: int,
        expert_bits: int | None = None,
        python: str = sys.executable,
    ) -> None:
        numbers = (bits, layers, threads, *(() if expert_bits is None else (expert_bits,)))
        super().__init__("moestro.bench.models", [engine, shape, *map(str, numbers)], python=python)

    def batch(self, sequences: int, context: int, steps: int) -> tuple[float, list[tuple[float, float]]]:
        """Seconds of a step of so many sequences with one new token each, and what it took.

        Returns:
            The seconds; and of experts, dense layers and attention each the bytes that a step read and its operations.
        """
        step_s, parts = self.ask("batch", sequences=sequences, context=context, steps=steps)
        return float(step_s), [(float(n_bytes), float(operations)) for n_bytes, operations in parts]

    def beams(self, beams: int, context: int, steps: int) -> tuple[float, float, float]:
        """Seconds of a step of a beam search, and the bytes of the cache that its reordering wrote, of all bytes."""
        step_s, moved_bytes, whole_bytes = self.ask("beams", beams=beams, context=context, steps=steps)
        return float(step_s), float(moved_bytes), float(whole_bytes)

    def outside_s(self) -> float:
        """Seconds a token that the last `decode_s` spent outside our kernels."""
        return float(self.ask("outside_s"))


class Engine:
    """The model that the worker times."""

    def __init__(
        self, engine: str, shape: str, bits: int | str, layers: int, threads: int, expert_bits: int | None = None
    ) -> None:
        import torch

        from ..compute.cpu import runner
        from ..loading import plug  # noqa: F401  # registers the quantizer and the experts function
        from ..loading.config import MoestroConfig
        from ..loading.random_model import build_random_model

        self._torch = torch
        torch.set_num_threads(threads)
        if engine == OURS:
            form = bits if isinstance(bits, str) else None
            config = MoestroConfig(
                device="cpu",
                threads=threads,
                bits=bits if isinstance(bits, int) else None,
                expert_bits=expert_bits,
                head_bits=None if expert_bits is None else 16,
            )
            self._model: Any = build_random_model(shape, config, dtype=torch.bfloat16, seed=0, layers=layers, form=form)
        else:
            self._model = _transformers_alone(shape, layers)
        self._runner = runner(threads)
        self._cache: Any = None
        self.outside_s = 0.0  # seconds a token outside our kernels, in the last decode_s
        self.decode_s(16, 2)

    def card(self) -> dict[str, Any]:
        """Bytes of weights that a decoded token reads, 0 where the engine is not ours, and of a token in a cache."""
        kept = [getattr(layer, name, None) for layer in self._cache.layers for name in ("keys", "values")]
        cached = sum(part.nbytes for part in kept if part is not None) / self._cache.get_seq_length()
        conductor = getattr(self._model, "moestro", None)
        if conductor is None:
            return {"token_bytes": 0, "cached_token_bytes": cached}
        top_k = self._model.config.num_experts_per_tok
        experts = sum(layer.expert_bytes * top_k for layer in conductor.spec.layers)
        return {"token_bytes": experts + self._dense_bytes(), "cached_token_bytes": cached}

    def batch(self, sequences: int, context: int, steps: int) -> tuple[float, list[tuple[float, float]]]:
        """As `ModelWorker.batch`."""
        self._fill_cache(sequences, context - 1)
        self._forward(1, sequences)  # where the cache's memory grows
        conductor, before = self._model.moestro, replace(self._model.moestro.counters)
        step_s = sum(self._forward(1, sequences) for _ in range(steps)) / steps
        after = conductor.counters
        experts, chosen = ((getattr(after, n) - getattr(before, n)) / steps for n in ("misses", "tokens"))
        self._cache = None  # of several sequences
        return step_s, [
            (
                experts * fmean(layer.expert_bytes for layer in conductor.spec.layers),
                2 * chosen * self._expert_weights(),
            ),
            (self._dense_bytes(), 2 * sequences * self._dense_weights()),
            self._attention_of(sequences, context + steps / 2),
        ]

    def _fill_cache(self, sequences: int, tokens: int) -> None:
        """A new cache with so many tokens of each sequence, whose keys and values are random instead of computed."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        torch = self._torch
        self._cache = DynamicCache(config=self._model.config)
        if tokens < 1:
            return
        self._forward(1, sequences)
        for place, layer in enumerate(self._cache.layers):
            if type(layer) is not DynamicLayer:
                kind = type(layer).__name__
                raise RequestError(f"--batch: layer {place} keeps a {kind}, which cannot be filled; take another")
            parts = (layer.keys, layer.values)
            more = [
                torch.randn(1, p.shape[1], tokens - 1, p.shape[3]).to(p.dtype).expand(sequences, -1, -1, -1)
                for p in parts
            ]
            self._cache.update(*more, place)

    def beams(self, beams: int, context: int, steps: int) -> tuple[float, float, float]:
        """As `ModelWorker.beams`. The first two steps, of the prompt and of rows that are still alike, do not count."""
        from transformers import StoppingCriteria

        figures, seen = self._model._reorder_cache, list[tuple[float, int, int]]()

        class Seen(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
            def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
                seen.append((perf_counter(), figures.moved_bytes, figures.whole_bytes))
                return ids.new_zeros(len(ids), dtype=torch.bool)

        torch = self._torch
        ids = torch.randint(0, self._model.config.vocab_size, (1, context))
        chosen = {"num_beams": beams, "max_new_tokens": steps + 3, "do_sample": False}
        self._model.generate(ids, **chosen, eos_token_id=None, pad_token_id=0, stopping_criteria=[Seen()])
        first, last = seen[2], seen[-1]
        step_s, moved_bytes, whole_bytes = ((b - a) / (len(seen) - 3) for a, b in zip(first, last, strict=True))
        return step_s, moved_bytes, whole_bytes

    def _dense_bytes(self) -> float:
        embedding = self._model.get_input_embeddings()
        table = embedding.matrix.packed if hasattr(embedding, "matrix") else embedding.weight
        looked_up = table.numel() * table.element_size()  # one row is read, not the table
        return float(self._model.moestro.spec.dense_bytes - looked_up)

    def _dense_weights(self) -> int:
        """Weights that a token is multiplied with outside the experts: of projections, head and routers."""
        from ..decode.dense import PackedLinear

        projections = [m.matrix for m in self._model.modules() if isinstance(m, PackedLinear)]
        table = getattr(self._model.get_input_embeddings(), "weight", None)
        routers = [p for p in self._model.parameters() if p.dim() == 2 and not p.is_meta and p is not table]
        return int(sum(m.rows * m.columns for m in projections) + sum(p.numel() for p in routers))

    def _expert_weights(self) -> int:
        shape = self._model.moestro.math[0].shape
        return int(shape.hidden * shape.neurons * (3 if shape.has_gate else 2))

    def _attention_of(self, sequences: int, length: float) -> tuple[float, float]:
        """Bytes of keys and values that a step reads, and its operations with them."""
        config = self._model.config
        heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
        width = width or config.hidden_size // heads
        tokens = sequences * length * config.num_hidden_layers
        kept = 2 * config.num_key_value_heads * width * self._model.dtype.itemsize
        return tokens * kept, tokens * 4 * heads * width

    def prefill_s(self, tokens: int) -> float:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        return self._forward(tokens)

    def decode_s(self, context: int, tokens: int) -> float:
        if self._cache is None or self._cache.get_seq_length() < context:
            self.prefill_s(context)
        if (extra := self._cache.get_seq_length() - context) > 0:
            self._shorten(extra, context)
        busy_s = self._runner.busy_s
        token_s = sum(self._forward(1) for _ in range(tokens)) / tokens
        self.outside_s = token_s - (self._runner.busy_s - busy_s) / tokens
        return token_s

    def _shorten(self, extra: int, context: int) -> None:
        """Take so many tokens off the cache; a layer with a window has forgotten what was before them."""
        if all(getattr(layer, "sliding_window", None) is None for layer in self._cache.layers):
            self._cache.crop(-extra)
        else:
            self.prefill_s(context)

    def _forward(self, tokens: int, sequences: int = 1) -> float:
        ids = self._torch.randint(0, self._model.config.vocab_size, (sequences, tokens))
        start_s = perf_counter()
        with self._torch.no_grad():
            self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return perf_counter() - start_s


def _transformers_alone(shape: str, layers: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from ..loading.random_model import shape_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(shape, layers), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    pool = torch.randn(2**22).mul_(0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            for piece in parameter.view(-1).split(pool.numel()):
                piece.copy_(pool[: piece.numel()])
        for name, buffer in model.named_buffers():
            if name.endswith("inv_freq"):  # of rotary embeddings; each is made anew off the meta device
                owner = model.get_submodule(name.rpartition(".")[0])
                buffer.copy_(type(owner)(config=model.config).inv_freq)
    return model.eval()


def main() -> None:
    """Load the model that the command line names, then answer questions."""

    engine, shape, bits, layers, threads, *expert_bits = sys.argv[1:]

    def start() -> tuple[dict[str, Any], Handlers]:
        form = int(bits) if bits.isdigit() else bits
        model = Engine(engine, shape, form, int(layers), int(threads), *map(int, expert_bits))
        handlers: Handlers = {"prefill_s": model.prefill_s, "decode_s": model.decode_s, "batch": model.batch}
        return model.card(), {**handlers, "beams": model.beams, "outside_s": lambda: model.outside_s}

    serve(start, ours=engine == OURS)


if __name__ == "__main__":
    main()
