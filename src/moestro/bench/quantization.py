"""Table 1 of Eliseev and Mazur (arXiv 2312.17238) for a model: size and perplexity by bits of dense layers and experts.

    moestro bench quantization demo --shape olmoe-1b-7b

Each cell loads the model in those bits and reads the same windows of a text. Embedding, output head, routers and norms
stay 16-bit, as in the paper. Hidden states are float32: in bfloat16 their rounding moves the demo's perplexity by 0.02,
more than 8-bit experts do. Beside the table stand the paper's own sizes (`paper_sizes.py`) and decode speeds of a real
shape with random weights (`bits_speed.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compute.cpu import core_cpus
from ..decode.dense import Packed
from ..errors import RequestError
from ..loading.checkpoint import is_stored, read_config
from ..loading.context import model_context
from ..loading.download import resolve
from ..loading.load import load, load_tokenizer
from ..loading.packed.manifest import is_packed
from ..planning.option import bits_in
from ..planning.options import BITS, ModelOptions
from ..planning.shapes import depth_of_shape
from ..progress import Bar, without_bars_of_transformers
from ..text.files import read_text
from ..text.generation import check_ids, encode
from .bits_speed import measure_bits
from .options import TABLE_BITS
from .paper_sizes import paper_sizes
from .perplexity import cut_windows, perplexity, standard_errors_apart, window_losses
from .quantization_report import OutOfOrder, QuantizationReport, QuantizationRow

SPEED_CELLS = ((16, 16), (4, 4), (4, 3), (4, 2))  # bits of dense layers and experts whose decode speed is measured
HELDOUT = Path(__file__).parents[1] / "demo" / "heldout.txt"
TOKENS, WINDOW = 32_768, 256
_Cell = tuple[int, int]  # bits of dense layers and of experts


@dataclass(frozen=True, slots=True)
class Reading:
    """A model and the text that it reads.

    text: a file; None for held-out stories, which the demo was not trained on. tokens: the most to read, from the
    text's beginning; 0 for all. window: tokens of a window.
    """

    model: str
    source: ModelOptions
    text: str | None = None
    tokens: int = TOKENS
    window: int = WINDOW

    @property
    def text_name(self) -> str:
        """What the text is called in a report."""
        return "held-out stories" if self.text is None else self.text

    def check(self) -> Any:
        """The model's config, where the model can be quantized and its context holds a window.

        Raises:
            RequestError: a quantized checkpoint, or too short a context. MoestroError: no such model.
        """
        path = resolve(self.model, self.source.revision, weights=False)
        if is_stored(path) or is_packed(Path(path)):
            raise RequestError(
                f"{self.model} is quantized already, and the table starts from 16 bits; give the unquantized checkpoint"
            )
        config = read_config(self.model, path, self.source.trust_remote_code)
        context = model_context(config)
        if self.window < 2 or (context is not None and self.window > context):
            raise RequestError(f"--window {self.window}: needs 2 to {context or 'any number of'}, the model's context")
        return config

    def windows(self, vocabulary: int) -> Tensor:
        """The text in windows, int64 [W, C].

        Args:
            vocabulary: how many tokens the model has.

        Raises:
            RequestError: no such file, too short a text, or tokens that the model does not have. CheckpointError: no
                tokenizer.
        """
        words = read_text(str(HELDOUT) if self.text is None else self.text)
        tokenizer = load_tokenizer(
            self.model,
            revision=self.source.revision,
            tokenizer=self.source.tokenizer,
            trust_remote_code=self.source.trust_remote_code,
        )
        ids = encode(tokenizer, words)
        check_ids(tokenizer, ids, vocabulary)
        return cut_windows(ids, self.window, self.tokens, self.text_name)


@dataclass(frozen=True, slots=True)
class SpeedRequest:
    """A shape whose decode speeds stand beside the table. layers, rounds: as `measure_bits` takes them."""

    shape: str
    layers: int | None = None
    rounds: int = 5
    cells: tuple[_Cell, ...] = SPEED_CELLS


def measure_quantization(
    reading: Reading,
    *,
    dense_bits: Sequence[int] = TABLE_BITS,
    expert_bits: Sequence[int] = TABLE_BITS,
    fit: str | None = None,
    speed: SpeedRequest | None = None,
    threads: int | None = None,
) -> QuantizationReport:
    """Measure a model's table.

    Args:
        dense_bits, expert_bits: rows and columns of the table. fit: as `moestro.load` takes it.
        speed: whose decode speeds to measure as well; None for none.
        threads: of the CPU's kernels; None for one on each physical core.

    Raises:
        RequestError: bits, a text or a shape that do not exist or do not do. MoestroError: the model does not load.
    """
    for name, given in (("dense_bits", dense_bits), ("expert_bits", expert_bits)):
        for bits in given:
            bits_in(BITS)(bits, name)
    config, count = reading.check(), threads or len(core_cpus())
    windows = reading.windows(config.get_text_config().vocab_size)
    depth = None if speed is None else depth_of_shape(speed.shape, speed.layers)
    speeds = (
        ()
        if speed is None
        else measure_bits(speed.shape, speed.cells, layers=depth, rounds=speed.rounds, threads=count)
    )
    # A float16 checkpoint stays as it is: its weights would not fit bfloat16, which 16 bits of a float32 model are.
    source = replace(reading.source, dtype="auto" if config.dtype == torch.float16 else "float32")
    rows, losses = [], {}
    cells = [*product(*(sorted({*given}, reverse=True) for given in (dense_bits, expert_bits)))]
    total = len(cells) * len(windows)
    with Bar("reading windows", total, "windows") as bar, without_bars_of_transformers():
        for dense, expert in cells:
            model = load(
                reading.model,
                **source.to_dict(),
                device="cpu",
                dense_bits=dense,
                expert_bits=expert,
                head_bits=16,
                fit=fit,
                threads=count,
                cache=False,
            )
            try:
                losses[dense, expert] = window_losses(model, windows, bar.advance)
                found = perplexity(losses[dense, expert], reading.window)
                rows.append(QuantizationRow(dense, expert, weight_bytes(model), found))
            finally:
                model.moestro.close()
            del model
    return QuantizationReport(
        model=reading.model,
        text=reading.text_name,
        tokens=windows.numel(),
        window=reading.window,
        rows=tuple(rows),
        out_of_order=tuple(out_of_order(losses)),
        shape=None if speed is None else speed.shape,
        layers=depth,
        speeds=speeds,
        sizes=paper_sizes(),
    )


def weight_bytes(model: Any) -> int:
    """Bytes of a loaded model's weights: packed ones as they are packed, the others with 16 bits each."""
    packed = {
        id(each.matrix.packed): each.matrix.packed.numel() for each in model.modules() if isinstance(each, Packed)
    }
    others = 2 * sum(parameter.numel() for parameter in model.parameters())
    return sum((model.moestro.spec.expert_bytes, *packed.values(), others))


def out_of_order(losses: Mapping[_Cell, Tensor]) -> Iterator[OutOfOrder]:
    """The neighbours in a row or a column of the table where fewer bits have lower losses.

    Args:
        losses: of the same windows in each cell, float64 [W].
    """
    for across in (False, True):
        lines: dict[int, list[_Cell]] = {}
        for dense, expert in sorted(losses, reverse=True):
            lines.setdefault(dense if across else expert, []).append((dense, expert))
        for line in lines.values():
            for more, fewer in pairwise(line):
                if float(losses[fewer].sum()) < float(losses[more].sum()):
                    apart = standard_errors_apart(losses[more], losses[fewer])
                    yield OutOfOrder(better=fewer, worse=more, standard_errors=apart)
