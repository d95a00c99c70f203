"""`moestro bench quantization`: its sizes and perplexities, computed once more from hqq's code and from the formats."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hqq.core.bitpack import BitPack
from transformers import AutoModelForCausalLM, AutoTokenizer

import moestro
from moestro.bench import bits_speed
from moestro.bench.bits_speed import measure_bits
from moestro.bench.kernels import moe_layer
from moestro.bench.models import OURS, ModelWorker
from moestro.bench.options import TABLE_BITS
from moestro.bench.paper_sizes import GIB, PAPER_GIB, hqq_bits, our_bytes, paper_sizes, rebuilt_bytes
from moestro.bench.perplexity import cut_windows, perplexity, standard_errors_apart, window_losses
from moestro.bench.quantization import (
    HELDOUT,
    SPEED_CELLS,
    TOKENS,
    Reading,
    measure_quantization,
    out_of_order,
)
from moestro.bench.quantization_report import QuantizationRow, draw_text
from moestro.cli.main import main as cli
from moestro.compute.cpu import levels
from moestro.errors import BudgetError, CheckpointError, RequestError
from moestro.memory.formats import FORMATS, format_named
from moestro.planning.options import ModelOptions

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
DEMO = Path(moestro.__file__).parent / "demo"
ROOT = Path(__file__).parent.parent
NAMES = {16: "bf16", 4: "hqq4", 3: "hqq3", 2: "hqq2"}  # the formats of so many bits
READING = Reading("demo", ModelOptions(), tokens=512, window=64)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command; status, standard output and standard error."""

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moestro", "bench", "quantization", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return called


# The paper's sizes.


@pytest.mark.parametrize(("dense", "expert"), [*product(TABLE_BITS, TABLE_BITS)])
def test_the_papers_sizes_follow_from_the_packing(dense: int, expert: int) -> None:
    printed = PAPER_GIB[dense][TABLE_BITS.index(expert)]
    assert rebuilt_bytes(dense, expert) / GIB == pytest.approx(printed, rel=0.01)
    if expert == 16:  # where the half GiB that no packing explains is not in it: to the last digit but one
        assert rebuilt_bytes(dense, expert) / GIB == pytest.approx(printed, abs=0.006)


@pytest.mark.parametrize(
    ("bits", "group", "super_group", "pack"),
    [(4, 64, 256, BitPack.pack_4bit_u8), (3, 64, 128, BitPack.pack_3bit_32), (2, 16, 128, BitPack.pack_2bit_u8)],
)
def test_bits_of_a_weight_are_those_of_what_hqq_packs(bits: int, group: int, super_group: int, pack: Any) -> None:
    """A table of groups goes through hqq's own packing; scales and zeros are counted as that package keeps them."""
    groups = 8 * super_group
    codes = pack(torch.randint(0, 2**bits, (group, groups), dtype=torch.uint8))
    scales_and_zeros = 2 * groups  # a byte each
    of_super_groups = groups // super_group * 2 * 2  # a scale and a zero in float16
    total = codes.numel() * codes.element_size() + scales_and_zeros + of_super_groups
    assert hqq_bits(bits) == pytest.approx(8 * total / (group * groups), rel=1e-9)


def test_our_sizes_stand_beside_the_papers() -> None:
    found = {(one.dense_bits, one.expert_bits): one for one in paper_sizes()}
    assert [*found] == [*product(TABLE_BITS, TABLE_BITS)]
    for (dense, expert), one in found.items():
        assert one.paper_gib == PAPER_GIB[dense][TABLE_BITS.index(expert)]
        assert one.rebuilt_gib == pytest.approx(rebuilt_bytes(dense, expert) / GIB, abs=0.005)
        assert one.ours_gib == pytest.approx(our_bytes(dense, expert) / GIB, abs=0.005)
        assert one.ours_gib <= min(one.paper_gib, one.rebuilt_gib)
        assert our_bytes(dense, expert) <= rebuilt_bytes(dense, expert)
        if expert == 16:  # what no packing explains counts for neither
            assert our_bytes(dense, expert) <= counted_by_hand(dense)


def counted_by_hand(bits: int) -> float:
    """Bytes of Mixtral-8x7B with attention of so many bits, from what hqq's own packing makes of a projection."""
    packs = {4: (64, 256, BitPack.pack_4bit_u8), 3: (64, 128, BitPack.pack_3bit_32), 2: (16, 128, BitPack.pack_2bit_u8)}
    rest = 2 * (2 * 32000 * 4096 + 65 * 4096 + 32 * 8 * 4096) + 32 * 8 * 3 * 14336 * 4096 * 2
    weights = 32 * 2 * (4096 + 1024) * 4096
    if bits == 16:
        return rest + 2 * weights
    group, super_group, pack = packs[bits]
    codes = pack(torch.zeros(group, 1024 * 4096 // group, dtype=torch.uint8))
    of_codes = codes.numel() * codes.element_size() * weights // (1024 * 4096)
    return rest + of_codes + weights // group * 2 + weights // group // super_group * 4


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_our_sizes_are_what_the_formats_pack(bits: int) -> None:
    """A slice of a projection of Mixtral's width is packed, and its bytes multiplied out."""
    fmt = format_named(NAMES[bits])
    panel = fmt.pack(torch.randn(16, 4096) * 0.02, fast=True).numel()
    attention = 32 * (4096 + 1024 + 1024 + 4096) // 16 * panel
    others = 2 * (2 * 32000 * 4096 + 65 * 4096 + 32 * 8 * 4096)
    experts = 32 * 8 * 3 * 14336 * 4096 * 2
    assert our_bytes(bits, 16) == attention + others + experts


# Windows and losses.


def test_windows_follow_each_other_and_the_rest_is_left_out() -> None:
    ids = torch.arange(23)
    assert torch.equal(cut_windows(ids, 5, 0, "a text"), torch.arange(20).view(4, 5))
    assert torch.equal(cut_windows(ids, 5, 12, "a text"), torch.arange(10).view(2, 5))
    with pytest.raises(RequestError, match=r"a text has 23 tokens, but a window has 24; give more, or a smaller --w"):
        cut_windows(ids, 24, 0, "a text")
    with pytest.raises(RequestError, match=r"--tokens 7, but a window has 8"):
        cut_windows(ids, 8, 7, "a text")


def test_losses_are_those_of_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(DEMO)(HELDOUT.read_text()[:3000], return_tensors="pt").input_ids[0]
    windows, done = cut_windows(ids, 96, 0, "a text"), list[int]()
    losses = window_losses(model, windows, done.append)
    assert losses.dtype == torch.float64
    assert sum(done) == len(windows) > 4
    for window, loss in zip(windows, losses, strict=True):
        with torch.no_grad():
            assert float(loss) == pytest.approx(95 * float(model(window[None], labels=window[None]).loss), rel=1e-5)
    assert perplexity(losses, 96) == pytest.approx(math.exp(float(losses.sum()) / (95 * len(windows))))
    with torch.no_grad():
        model.model.norm.weight[7] = math.nan
    with pytest.raises(CheckpointError, match="is not a finite number"):
        window_losses(model, windows[:1])


def test_standard_errors_of_a_difference() -> None:
    base = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    apart = torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64)  # mean 2, deviation 2 / sqrt 3
    assert standard_errors_apart(base + apart, base) == pytest.approx(2 / (2 / 3**0.5 / 2))
    assert standard_errors_apart(base, base + apart) == pytest.approx(-2 / (2 / 3**0.5 / 2))
    assert standard_errors_apart(base, base) == 0
    assert standard_errors_apart(base + 1, base) == math.inf


def test_what_is_out_of_order_is_found() -> None:
    """A table of 3 x 2 cells with two faults: one in a row, one in a column."""
    means = {(16, 16): 1.0, (16, 4): 2.0, (4, 16): 1.5, (4, 4): 1.4, (3, 16): 1.6, (3, 4): 1.3}
    noise = torch.tensor([0.0, 0.1, 0.0, -0.1], dtype=torch.float64)
    losses = {cell: mean + noise * sum(cell) for cell, mean in means.items()}
    found = {(one.better, one.worse) for one in out_of_order(losses)}
    assert found == {((4, 4), (4, 16)), ((3, 4), (3, 16)), ((4, 4), (16, 4)), ((3, 4), (4, 4))}
    assert all(one.standard_errors > 0 for one in out_of_order(losses))
    assert not [*out_of_order({cell: losses[cell] for cell in ((16, 16), (16, 4), (4, 16), (3, 16))})]


# The table.


def test_the_text_that_ships_is_the_beginning_of_the_held_out_books() -> None:
    if not (ROOT / "data").exists():
        pytest.skip("not a checkout")
    text = HELDOUT.read_text()
    assert (ROOT / "data" / "stories" / "heldout.txt").read_text().startswith(text)
    assert len(AutoTokenizer.from_pretrained(DEMO)(text, verbose=False).input_ids) >= TOKENS


def test_cells_are_recomputed() -> None:
    """Sizes from the formats, perplexities with Transformers on weights that are packed and unpacked."""
    low = TABLE_BITS[-1]
    report = measure_quantization(READING, dense_bits=(16, low), expert_bits=(low, 16), threads=1)
    assert [(row.dense_bits, row.expert_bits) for row in report.rows] == [(16, 16), (16, low), (low, 16), (low, low)]
    ids = AutoTokenizer.from_pretrained(DEMO)(HELDOUT.read_text(), verbose=False).input_ids
    windows = torch.tensor(ids)[:512].view(8, 64)
    for row in report.rows:
        model, size = _rounded(row.dense_bits, row.expert_bits)
        assert row.size_bytes == size
        expected = perplexity(window_losses(model, windows), 64)
        assert row.perplexity == pytest.approx(expected, rel=2e-4), row
    assert report.rows[0].size_bytes == sum(2 * p.numel() for p in model.parameters())
    assert (report.tokens, report.window, report.text) == (512, 64, "held-out stories")
    assert (report.speeds, report.shape, report.layers) == ((), None, None)


def test_a_table_without_a_fit() -> None:
    """The perplexity of weights that were rounded at once, which is another."""
    found = [
        measure_quantization(READING, dense_bits=(16,), expert_bits=(2,), fit=fit, threads=1).rows[0].perplexity
        for fit in ("none", "hqq", None)
    ]
    assert found[1] == found[2] != found[0]
    ids = AutoTokenizer.from_pretrained(DEMO)(HELDOUT.read_text(), verbose=False).input_ids
    options: dict[str, Any] = {"dtype": "float32", "expert_bits": 2, "dense_bits": 16, "head_bits": 16, "fit": "none"}
    model = moestro.load("demo", threads=1, cache=False, **options)
    expected = perplexity(window_losses(model, torch.tensor(ids)[:512].view(8, 64)), 64)
    assert found[0] == pytest.approx(expected, rel=1e-6)


def _rounded(dense: int, expert: int) -> tuple[Any, int]:
    """Transformers' model, with each matrix as our formats keep it, and the bytes of all weights.

    The neurons of an expert are filled up to whole blocks of 256, where a format is quantized; down is a matrix for
    each block.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    size = 2 * sum(p.numel() for p in model.parameters())

    def rounded(matrix: torch.Tensor, bits: int, more_rows: int = 0, more_columns: int = 0) -> int:
        """Round in place; the bytes that this adds, or takes off."""
        fmt = format_named(NAMES[bits])
        matrix.copy_(fmt.unpack(fmt.pack(matrix), matrix.shape[1], torch.float32)[: len(matrix)])
        return fmt.pack(torch.nn.functional.pad(matrix, (0, more_columns, 0, more_rows))).numel() - 2 * matrix.numel()

    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                size += rounded(projection.weight, dense)
            experts = layer.mlp.experts
            more = 0 if expert == 16 else -experts.down_proj.shape[2] % 256
            for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
                size += sum(rounded(matrix, expert, more_rows=more) for matrix in gate_up.chunk(2))
                for block in down.split(down.shape[1] if expert == 16 else 256, dim=1):
                    size += rounded(block, expert, more_columns=0 if expert == 16 else 256 - block.shape[1])
    return model, size


def test_the_command(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text(HELDOUT.read_text()[:2500])
    small = ["--tokens", "0", "--window", "128", "-t", "1", "--expert-bits", "16", "--expert-bits", "3"]
    status, out, err = run("demo", "--text", str(text), *small, "--dense-bits", "16", "--json")
    assert not status, err
    printed = json.loads(out.splitlines()[-1])
    assert [row.keys() for row in printed["rows"]] == [{"dense_bits", "expert_bits", "size_bytes", "perplexity"}] * 2
    assert len(printed["sizes"]) == 16
    assert printed["sizes"][0].keys() == {"dense_bits", "expert_bits", "paper_gib", "rebuilt_gib", "ours_gib"}
    assert printed["speeds"] == []
    assert {"cpu", "commit"} <= printed.keys()
    status, out, _ = run("demo", "--text", str(text), *small, "--dense-bits", "16")
    assert not status
    assert f"{printed['rows'][0]['perplexity']:.3f}" in out
    assert "86.99" in out


@needs_kernels
@pytest.mark.long
def test_speeds_of_a_shape(run: Run) -> None:
    small = ["--tokens", "64", "--window", "64", "-t", "1", "--expert-bits", "16", "--dense-bits", "16"]
    status, out, err = run("demo", *small, "--shape", "tiny", "--layers", "2", "--rounds", "1", "--json")
    assert not status, err
    printed = json.loads(out.splitlines()[-1])
    assert (printed["shape"], printed["layers"]) == ("tiny", 2)
    assert [(one["dense_bits"], one["expert_bits"]) for one in printed["speeds"]] == [*SPEED_CELLS]
    assert all(1 < one["decode_tok_s"] < 1e6 for one in printed["speeds"])


@pytest.mark.long
@needs_kernels
def test_a_worker_has_the_bits_that_it_is_asked_for() -> None:
    low = TABLE_BITS[-1]
    with (
        ModelWorker(OURS, "tiny", bits=16, expert_bits=low, layers=2, threads=1) as fewer,
        ModelWorker(OURS, "tiny", bits=16, layers=2, threads=1) as all_16,
    ):
        layer = moe_layer("tiny")
        saved = (
            2
            * layer.top_k
            * (FORMATS["bf16"].expert_bytes(layer.expert) - FORMATS[NAMES[low]].expert_bytes(layer.expert))
        )
        assert all_16.card["token_bytes"] - fewer.card["token_bytes"] == saved


@needs_kernels
def test_models_that_do_not_fit_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits_speed, "available_ram_bytes", lambda: 12 * 2**30)
    with pytest.raises(
        BudgetError, match=r"decoding with 4 models of olmoe-1b-7b, 16 layers needs .*; --layers \d+ would"
    ):
        measure_bits("olmoe-1b-7b", SPEED_CELLS)


def test_the_plot(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra 'plots', is not installed")
    plot = tmp_path / "table.svg"
    small = ["--tokens", "64", "--window", "64", "-t", "1", "--expert-bits", "16", "--dense-bits", "16"]
    status, _, err = run("demo", *small, "--plot", str(plot))
    assert not status, err
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert "MiB of weights" in plot.read_text()


def test_the_plot_of_characters() -> None:
    rows = [QuantizationRow(16, 16, 1000, 10.0), QuantizationRow(4, 16, 100, 20.0), QuantizationRow(4, 4, 100, 20.0)]
    lines = [*draw_text(rows)]
    assert re.fullmatch(r" +20\.00 \|\*", lines[0])
    bottom = next(line for line in lines if "10.00" in line)
    assert bottom.endswith("#")
    assert len(bottom) == len(lines[-3])
    assert [*draw_text(rows[:1])]  # a single cell has no scale


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--text", "nowhere.txt"], "the text nowhere.txt cannot be read"),
        (
            ["demo", "--text", "SHORT"],
            r"short.txt has \d+ tokens, but a window has 256; give more, or a smaller --window",
        ),
        (["demo", "--tokens", "100"], "--tokens 100, but a window has 256; give more, or a smaller --window"),
        (["demo", "--window", "513"], "--window 513: needs 2 to 512, the model's context"),
        (["demo", "--dense-bits", "5"], "--dense-bits 5: there are 16, "),
        (["demo", "--expert-bits", "7"], "--expert-bits 7: there are 16, "),
        (["demo", "--shape", "huge"], "no shape 'huge'; there are: "),
        (["demo", "--plot", "/nowhere/a.svg"], "/nowhere/a.svg cannot be written|--plot needs matplotlib"),
        (["QUANTIZED"], "is quantized already, and the table starts from 16 bits; give the unquantized checkpoint"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    short, quantized = tmp_path / "short.txt", tmp_path / "quantized"
    short.write_text("Once upon a time.")
    quantized.mkdir()
    config = json.loads((DEMO / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (quantized / "config.json").write_text(json.dumps(config))
    places = {"SHORT": str(short), "QUANTIZED": str(quantized)}
    status, out, err = run(*(places.get(one, one) for one in arguments))
    assert status == 2
    assert not out
    line = err.strip().splitlines()[-1]
    assert re.search(says, line), line
    assert err.startswith("error: ")
    assert err.count("\n") == 1
