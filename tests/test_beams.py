"""Beam search: the tokens of Transformers' own, and no more of the cache moved than changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, MixtralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from families import save_model
from moestro import load, load_tokenizer
from moestro.decode.beams import ReorderCache, WindowLayer, read_once
from moestro.decode.capture import CapturedSteps, StepCache
from moestro.decode.cpu.cache import RoomLayer
from moestro.decode.rows import Reordering, all_shared, carry_out
from moestro.planning.contract import Outcome, Phase, Step, StepInfo
from moestro.text.generation import generate_text
from moestro.text.options import TextOptions

ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 2, "dtype": "float32"}
BEAMS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HEADS, WIDTH, WINDOW = 2, 3, 6
CONFIG = MixtralConfig(
    num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH, hidden_size=WIDTH * HEADS
)
ROWS = st.integers(1, 6)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_copies_are_those_that_rows_need(data: st.DataObject) -> None:
    """Against all rows taken at once, over several steps: what is alike is not copied, all else is right."""
    rows = data.draw(ROWS)
    part, shared = torch.randn(rows, HEADS, 12, WIDTH), None
    if data.draw(st.booleans()):
        part[:, :, :2], shared = part[0, :, :2].clone(), all_shared(rows, 2)
    for length in range(2, 9):
        parents = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        reordering = Reordering(parents)
        wanted = part.index_select(0, torch.tensor(parents))
        wanted[:, :, length:] = part[:, :, length:]
        copies = reordering.copies(shared, length)
        needed = {row: 0 if shared is None else shared[row][parents[row]] for row in reordering.changed}
        into_rows = {each.row: each.since for each in copies if each.row >= 0}
        assert into_rows == {row: since for row, since in needed.items() if since < length}
        aside = sum(length - each.since for each in copies if each.row < 0)
        tokens = sum(length - since for since in needed.values()) + aside
        assert carry_out(part, copies, length) == tokens * HEADS * WIDTH * part.element_size()
        assert torch.equal(part, wanted)
        shared = reordering.shared_after(shared, length)
        for a in range(rows):
            for b in range(rows):
                assert torch.equal(part[a, :, : shared[a][b]], part[b, :, : shared[a][b]])
        part[:, :, length] = torch.randn(rows, HEADS, WIDTH)


def test_one_row_of_each_cycle_waits_aside() -> None:
    for parents, aside in (([0, 1, 2], 0), ([0, 0, 0], 0), ([1, 0, 0], 1), ([1, 2, 0, 3], 1), ([1, 0, 3, 2], 2)):
        copies = Reordering(parents).copies(None, 5)
        assert sum(each.row < 0 for each in copies) == aside
        assert len(copies) == aside + sum(row != parent for row, parent in enumerate(parents))


def _grow(layers: list[Any], tokens: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    new = torch.randn(2, rows, HEADS, tokens, WIDTH)
    return [layer.update(*new) for layer in layers]


def _equal(ours: Any, theirs: Any) -> None:
    assert ours.is_initialized == theirs.is_initialized
    assert ours.get_seq_length() == theirs.get_seq_length()
    if theirs.is_initialized:
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("grow", "reorder", "reorder", "crop", "edit", "replace", "hold", "copy")), st.integers(0)
    ),
    min_size=4,
    max_size=24,
)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["plain", "window"])
@given(ROWS, STEPS)
@settings(max_examples=60, deadline=None)
def test_a_layer_holds_what_transformers_does(mode: Any, kind: str, rows: int, steps: list[tuple[str, int]]) -> None:
    """Whatever is done between two reorderings, and nothing that was taken from the cache before is changed."""
    theirs: Any = DynamicLayer() if kind == "plain" else DynamicSlidingWindowLayer(WINDOW)
    cache: Any = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = [copy.copy(theirs)], None
    reorder, taken = ReorderCache(), list[tuple[Tensor, Tensor]]()
    with mode():
        _grow([cache.layers[0], theirs], 4, rows)
        for name, number in steps:
            ours = cache.layers[0]
            random = torch.Generator().manual_seed(number % 2**32)
            if name == "grow":
                for a, b in zip(*_grow([ours, theirs], 1 + number % 2, rows), strict=True):
                    assert torch.equal(a, b)
            elif name == "reorder":
                parents = torch.randint(0, rows, (rows,), generator=random)
                reorder(cache, parents)
                theirs.reorder_cache(parents)
                _grow([cache.layers[0], theirs], 1, rows)
            elif name == "crop" and kind == "plain" and theirs.get_seq_length() > 2:
                for layer in (ours, theirs):
                    layer.crop(-1)
            elif name == "edit" and mode is torch.no_grad:  # in inference mode torch counts no writes
                for layer in (ours, theirs):
                    layer.keys = layer.keys.clone() if layer is theirs else layer.keys
                    layer.keys[number % rows, :, 0] = number % 7
            elif name == "replace":
                for layer in (ours, theirs):
                    layer.values = layer.values + number % 5
            elif name == "hold":
                taken.append((ours.keys, ours.keys.clone()))
            elif name == "copy":
                other = copy.copy(ours)
                taken.append((other.values, other.values.clone()))
            _equal(cache.layers[0], theirs)
            if name != "edit":
                for held, was in taken:
                    assert torch.equal(held, was)
            else:
                taken.clear()
    assert reorder.moved_bytes <= 1.5 * reorder.whole_bytes  # with cycles of two rows


@given(ROWS, st.integers(0))
@settings(max_examples=40, deadline=None)
def test_a_step_cache_holds_what_a_static_one_does(rows: int, seed: int) -> None:
    """Full layers and windows that fill; in place, so that captured steps find it where it was."""
    config = MixtralConfig(**(CONFIG.to_diff_dict() | {"sliding_window": WINDOW if seed % 2 else None}))
    cache, twin = StepCache(config, 32), [DynamicLayer() for _ in range(2)]
    random, reorder = torch.Generator().manual_seed(seed % 2**32), ReorderCache()
    for step in range(16):
        new = torch.randn(2, 2, rows, HEADS, 3 if step == 0 else 1, WIDTH, generator=random)
        for index in range(2):
            cache.update(*new[index], index)
            twin[index].update(*new[index])
        places = [layer.keys.data_ptr() for layer in cache.layers]
        parents = torch.randint(0, rows, (rows,), generator=random)
        reorder(cache, parents)
        if not seed % 2 and step in (6, 11):
            cache.crop(-2)
            for each in twin:
                each.crop(-2)
        assert places == [layer.keys.data_ptr() for layer in cache.layers]
        length = twin[0].get_seq_length() + (2 if not seed % 2 and step in (6, 11) else 0)
        for index in range(2):
            twin[index].reorder_cache(parents)
            kept = min(twin[index].get_seq_length(), cache.layers[index].max_cache_len)
            assert torch.equal(cache.layers[index].keys[:, :, :kept], twin[index].keys[:, :, -kept:]), length
            assert torch.equal(cache.layers[index].values[:, :, :kept], twin[index].values[:, :, -kept:])


# Full attention and windows, latent attention, recurrent layers between, indexed and compressed keys.
FAMILIES = ["mixtral", "olmoe", "gpt_oss", "deepseek_v3", "qwen3_next", "glm_moe_dsa", "minimax", "deepseek_v4"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Of two prompts at once by `generate`, and of one whose prompt is computed once for its beams."""
    save_model(family, tmp_path)
    ours, theirs = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    assert isinstance(ours._reorder_cache, ReorderCache)
    assert not hasattr(theirs, "_reorder_cache")
    ids = torch.randint(3, 100, (2, 9))
    for beams in (2, 5):
        given = {"max_new_tokens": 6, "num_beams": beams, "num_return_sequences": 2, **BEAMS}
        assert torch.equal(*(model.generate(ids, **given) for model in (ours, theirs)))
    for model, length in ((ours, 9), (theirs, 9), (ours, 1)):
        options = TextOptions(max_new_tokens=8, num_beams=4, temperature=0)
        text = generate_text(model, load_tokenizer(shape="tiny"), ids[1, :length], options)
        wanted = theirs.generate(ids[1:, :length], max_new_tokens=8, num_beams=4, **BEAMS)
        assert torch.equal(text.sequence, wanted[0])


def test_a_prompt_of_beams_is_computed_once(tmp_path: Path) -> None:
    save_model("olmoe", tmp_path)
    model = load(str(tmp_path), **ON_CPU)
    layers, length, beams = len(model.moestro.spec.layers), 40, 8
    before = model.moestro.counters.tokens
    cache = read_once(model, torch.randint(3, 100, (length,)), beams)
    assert cache is not None
    assert model.moestro.counters.tokens - before == (length - 1) * layers * 2  # each token goes to two experts
    assert cache.layers[0].keys.shape[0] == beams
    assert read_once(model, torch.tensor([5]), beams) is None


class _Noted(ReorderCache):
    """Also notes which rows went on from which."""

    def __init__(self) -> None:
        super().__init__()
        self.parents: list[list[int]] = []

    def __call__(self, cache: Any, beam_idx: Tensor) -> Any:
        self.parents.append(beam_idx.tolist())
        return super().__call__(cache, beam_idx)


@pytest.mark.parametrize(("family", "window"), [("olmoe", None), ("mixtral", 6), ("deepseek_v3", None)])
def test_bytes_that_beams_move(family: str, window: int | None, tmp_path: Path) -> None:
    """Of each layer, for each row with another parent, the tokens since the two split; before, all of all rows."""
    save_model(family, tmp_path)
    model, beams, prompt, new = load(str(tmp_path), **ON_CPU), 4, 20, 24
    model._reorder_cache = noted = _Noted()
    options = TextOptions(max_new_tokens=new, num_beams=beams, temperature=0)
    generate_text(model, load_tokenizer(shape="tiny"), torch.randint(3, 100, (prompt,)), options)
    cache = read_once(model, torch.randint(3, 100, (3,)), 1)
    assert cache is not None
    of_token = sum(sum(p[0, :, 0].numel() * 4 for p in (layer.keys, layer.values)) for layer in cache.layers)
    # Each token of a row is named after the step and the row that wrote it: alike is what has the same names.
    histories = [[(i, 0) for i in range(prompt - 1)] for _ in range(beams)]
    moved = aside = whole = 0
    for step, parents in enumerate(noted.parents):
        histories = [[*history, (prompt + step, row)] for row, history in enumerate(histories)]
        length = len(histories[0])
        let_go = 0 if window is None else max(0, length - window + 1)
        for row, parent in enumerate(parents):
            pairs = zip(histories[row], histories[parent], strict=True)
            split = next((at for at, (a, b) in enumerate(pairs) if a != b), length)
            moved += length - max(split, let_go) if split < length else 0
        aside += max(0, length - max(prompt - 1, let_go)) * (beams // 2)
        whole += beams * (length - let_go)
        histories = [histories[parent] for parent in parents]
    assert len(noted.parents) == new
    assert noted.whole_bytes == whole * of_token
    assert moved * of_token <= noted.moved_bytes <= (moved + aside) * of_token
    assert noted.moved_bytes < noted.whole_bytes / (1.5 if window else 4)


def test_layers_that_are_not_known_go_transformers_way() -> None:
    """Once for each reordering in which a row has another parent, and not at all where none has."""
    calls = list[list[int]]()

    class Other(DynamicLayer):  # type: ignore[misc]
        def reorder_cache(self, beam_idx: Tensor) -> None:
            calls.append(beam_idx.tolist())
            super().reorder_cache(beam_idx)

    cache: Any = DynamicCache()
    cache.layers = [Other(), DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)]
    for layer in cache.layers:
        layer.update(*torch.randn(2, 3, HEADS, 4, WIDTH))
    reorder = ReorderCache()
    for parents in ([0, 1, 2], [0, 0, 1]):
        reorder(cache, torch.tensor(parents))
    assert calls == [[0, 0, 1]]
    assert [type(layer) for layer in cache.layers] == [Other, RoomLayer, WindowLayer]


class _Steps:
    """Notes what each layer step was asked to do, and did."""

    lookahead = 0

    def __init__(self) -> None:
        self.seen: list[tuple[Step, Outcome]] = []
        self._asked: Step | None = None

    def begin(self, info: StepInfo) -> None:
        pass

    def asked(self, step: Step, top_k: int) -> None:
        self._asked = step

    def done(self, outcome: Outcome) -> None:
        assert self._asked is not None
        self.seen.append((self._asked, outcome))


def test_a_step_of_beams_copies_the_union_of_its_experts(tmp_path: Path) -> None:
    """On the emulated device: an expert that is in no slot crosses once a step, however many beams it serves.

    The answer is the one that the CPU alone gives.
    """
    save_model("qwen3_moe", tmp_path, {"max_position_embeddings": 160})
    beams, new, ids = 8, 10, torch.randint(3, 100, (9,))
    options = TextOptions(max_new_tokens=new, num_beams=beams, temperature=0)
    alone = load(str(tmp_path), **ON_CPU)
    wanted = generate_text(alone, load_tokenizer(shape="tiny"), ids, options)
    model = load(str(tmp_path), **ON_CPU | {"device": "emulated"}, gpu_memory="560KiB", policy="lru")
    assert isinstance(model.forward, CapturedSteps)
    steps = model.moestro.listener = _Steps()
    text = generate_text(model, load_tokenizer(shape="tiny"), ids, options)
    assert torch.equal(text.sequence, wanted.sequence)
    assert model.forward.figures.replays > 0
    spec, of_decode = model.moestro.spec, [each for each in steps.seen if each[0].phase is Phase.DECODE]
    assert len(of_decode) == (new - 1) * len(spec.layers)
    for step, outcome in of_decode:
        assert sum(step.tokens.values()) == beams * 2  # each token goes to two experts of eight
        assert sorted((*outcome.hits, *outcome.joined, *outcome.misses)) == sorted(step.tokens)
        assert outcome.moved_bytes == len(outcome.misses) * spec.layers[outcome.layer].expert_bytes
    assert any(outcome.misses for _, outcome in of_decode)
    assert any(outcome.hits for _, outcome in of_decode)
