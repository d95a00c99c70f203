"""The worker of `moestro bench decode`: a random model of a real shape, by Moestro or by Transformers alone.

    python -m moestro.bench.models ENGINE SHAPE BITS LAYERS THREADS [EXPERT_BITS]

BITS is a number or the form of a checkpoint, like q4_k_m. With EXPERT_BITS, it is that of the dense layers, and
embedding and head have 16. The worker answers by the protocol of worker.py, and times forward passes with a cache and
random tokens; it does not sample.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

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
        """Bytes of weights that a decoded token reads; 0 where the engine is not ours."""
        conductor = getattr(self._model, "moestro", None)
        if conductor is None:
            return {"token_bytes": 0}
        top_k = self._model.config.num_experts_per_tok
        embedding = self._model.get_input_embeddings()
        table = embedding.matrix.packed if hasattr(embedding, "matrix") else embedding.weight
        looked_up = table.numel() * table.element_size()  # one row is read, not the table
        experts = sum(layer.expert_bytes * top_k for layer in conductor.spec.layers)
        return {"token_bytes": experts + conductor.spec.dense_bytes - looked_up}

    def prefill_s(self, tokens: int) -> float:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        return self._forward(tokens)

    def decode_s(self, context: int, tokens: int) -> float:
        if self._cache is None or self._cache.get_seq_length() < context:
            self.prefill_s(context)
        if (extra := self._cache.get_seq_length() - context) > 0:
            self._cache.crop(-extra)
        busy_s = self._runner.busy_s
        token_s = sum(self._forward(1) for _ in range(tokens)) / tokens
        self.outside_s = token_s - (self._runner.busy_s - busy_s) / tokens
        return token_s

    def _forward(self, tokens: int) -> float:
        ids = self._torch.randint(0, self._model.config.vocab_size, (1, tokens))
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
        handlers: Handlers = {"prefill_s": model.prefill_s, "decode_s": model.decode_s}
        return model.card(), {**handlers, "outside_s": lambda: model.outside_s}

    serve(start, ours=engine == OURS)


if __name__ == "__main__":
    main()
