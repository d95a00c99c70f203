"""Every family against Transformers alone: one runner, one line a family in `engine/families.py`.

What the runs showed is the table of docs/models.md; the last test compares it with the file, and
`pytest tests/test_families.py --update-docs` writes it.
"""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from families import (
    FAMILIES,
    FORWARD_ONLY,
    INSTALLED,
    TABLE_OF,
    UNSUPPORTED,
    Family,
    build_model,
    decorated_folders,
    experts_calls,
    random_ids,
    reference_logits,
)
from family_table import of_model
from moestro import MoestroConfig, load
from moestro.compute.cpu import CpuExperts
from moestro.engine import chunks
from moestro.engine.chunks import REREAD, can_be_chunked
from moestro.engine.families import expert_modules
from moestro.loading.build import home
from moestro.memory.formats import ExpertFormat, UnpackedExpert
from moestro.planning.model_config import families
from moestro.text.tracing import listening
from survey_checks import same_bytes

DOC = Path(__file__).parents[1] / "docs" / "models.md"
FORMS = "<!-- forms: written by tests/test_families_stored.py -->\n"
NEW_TOKENS = 6
TOLERANCE = 1e-5

# family -> (MoE layers, kernel, what its gates gave), filled by the runs below
RAN: dict[str, tuple[int, str, str]] = {}


class OneUnpacked:
    """Watches that an unpacked expert is gone before the next one is unpacked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._last: weakref.ref[torch.Tensor] | None = None
        unpack = ExpertFormat.unpack

        def watched(*args: Any) -> UnpackedExpert:
            assert self._last is None or self._last() is None, "two experts are unpacked at once"
            expert = unpack(*args)
            self.count += 1
            self._last = weakref.ref(expert.up)
            return expert

        monkeypatch.setattr(ExpertFormat, "unpack", watched)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _load(family: Family, path: Path) -> Any:
    if family.auto == "AutoModelForTokenClassification":  # nothing that `load` would run
        auto = getattr(transformers, family.auto)
        return auto.from_pretrained(path, dtype=torch.float32, quantization_config=MoestroConfig(device="cpu"))
    return load(str(path), dtype="float32", device="cpu", threads=1)


def _appending_works(model: Any, ids: torch.Tensor) -> bool:
    """Whether several tokens appended to a filled cache give what a fresh run gives, as chat needs."""
    # Beyond every sliding window here, but not beyond an indexer's 16 positions: there, which of equal scores it
    # takes depends on how many tokens it is called with.
    long, past = torch.cat([ids, ids.flip(1)[:, :6]], 1), 7
    cache = model(long[:, :past], use_cache=True).past_key_values
    appended = model(long[:, past:], past_key_values=cache, use_cache=True).logits
    return _difference(appended, model(long).logits[:, past:]) <= 10 * TOLERANCE


def _zero_a_used_expert(model: Any) -> None:
    conductor = model.moestro
    seen: dict[tuple[int, int], int] = {}
    decide = conductor.policy.decide

    def spy(step: Any, view: Any, costs: Any) -> Any:
        for expert, tokens in step.tokens.items():
            seen[step.layer, expert] = seen.get((step.layer, expert), 0) + tokens
        return decide(step, view, costs)

    conductor.policy.decide = spy
    yield
    del conductor.policy.decide
    layer, expert = max(seen, key=lambda key: seen[key])
    home(conductor, layer, expert).zero_()
    yield


@pytest.mark.parametrize("family", [*FAMILIES, *FORWARD_ONLY], ids=lambda family: family.name)
@torch.no_grad()
def test_parity(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = build_model(family)
    reference.save_pretrained(tmp_path)
    ids = random_ids()
    generates = family not in FORWARD_ONLY
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    expected_tokens = reference.generate(ids, **greedy) if generates else None
    expected = reference_logits(family, reference, ids)

    model = _load(family, tmp_path)
    conductor = model.moestro
    if generates:
        same_bytes(tmp_path, model)
        assert of_model(family.name, reference).items() <= families()[reference.config.model_type].items()
    assert not [n for n, _ in model.named_parameters() if re.search(r"\bexperts\.(gate_up|up|down)_proj", n)]
    assert not any(p.device.type == "meta" for p in model.parameters())
    zeroing = _zero_a_used_expert(model)
    next(zeroing)
    logits = model(ids).logits
    assert _difference(logits, expected) <= TOLERANCE
    assert conductor.counters.layer_steps == experts_calls(family, reference)
    if generates:
        assert torch.equal(model.generate(ids, **greedy), expected_tokens)
        assert conductor.counters.layer_steps == experts_calls(family, reference) * (1 + NEW_TOKENS)
        assert _appending_works(model, ids) or model.config.model_type in REREAD
        before = conductor.counters.layer_steps
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "ram_chunk", lambda *_: 3)
            assert torch.equal(model.generate(ids, **greedy), expected_tokens)
        prompts = -(-ids.shape[1] // 3) if can_be_chunked(model) else 1
        assert conductor.counters.layer_steps - before == experts_calls(family, reference) * (prompts + NEW_TOKENS - 1)

    next(zeroing)
    broken = model(ids).logits
    assert _difference(broken, expected) > 100 * TOLERANCE, "a lost expert would go unnoticed"

    RAN[family.name] = _row(model, ids)

    watch = OneUnpacked(monkeypatch)
    conductor.cpu = CpuExperts(level="torch")
    assert _difference(model(ids).logits, broken) <= TOLERANCE  # the twin agrees
    assert watch.count > 0


def _row(model: Any, ids: torch.Tensor) -> tuple[int, str, str]:
    """What docs/models.md says of a model: MoE layers, what computed them, how its gates' rules did."""
    names = list(expert_modules(model))
    with listening(model) as recorder:
        model(ids)
    found = [share for share in recorder.trace(model, "", None).agreement if share is not None]
    gates = "no" if not found else "yes" if min(found) == 1 else f"{min(found):.0%}"
    if 0 < len(found) < len(names):
        gates += f", {len(found)} layers"
    conductor = model.moestro
    kernels = (conductor.cpu.kernel(math) for math in conductor.math)
    return len(names), ", ".join(sorted({"torch" if k is None else k[0] for k in kernels})), gates


needs_its_own_version = pytest.mark.skipif(INSTALLED != TABLE_OF, reason=f"the table is of Transformers {TABLE_OF}")


@needs_its_own_version
def test_every_family_behind_the_interface_is_in_the_table() -> None:
    names = [family.name for family in (*FAMILIES, *FORWARD_ONLY)]
    assert len(FAMILIES) >= 40
    assert len(set(names)) == len(names)
    assert not decorated_folders() - set(names) - set(UNSUPPORTED)


def _document() -> str:
    rows = "\n".join(
        f"| {name} | {layers} | {kernel} | {gates} |" for name, (layers, kernel, gates) in sorted(RAN.items())
    )
    folders = len(decorated_folders())
    broken = "\n".join(f"- **{name}**: {reason}." for name, reason in sorted(UNSUPPORTED.items()))
    forward_only = ", ".join(family.name for family in FORWARD_ONLY)
    version = transformers.__version__
    return f"""# Models

Written by `pytest tests/test_families.py --update-docs` from what the tests ran; not edited by hand.

Each line is a tiny random model of that family in its own checkpoint format, loaded by Moestro and compared
with Transformers {version} alone: relative difference of the logits at most {TOLERANCE:g} in float32, equal greedy
tokens, no expert parameter left in the model, one call of the conductor for each MoE layer and step, and the
comparison fails when one used expert is zeroed. All {folders} folders of Transformers whose experts go through its
experts interface are on this page; a name with something appended is a second way to build that family.

- **MoE layers**: of the tiny model, not of the real ones.
- **kernel**: the gate of the compiled CPU kernels that computed its experts. `torch`: none of theirs is this
  family's, so its experts run in plain torch, float32 arithmetic.
- **next gate**: whether the routers that feed the experts were found, which speculative loading needs. A figure: which
  part of a layer's own choices the best rule known here gives, where that is not all (the least of the layers).

| family | MoE layers | kernel | next gate |
| --- | --- | --- | --- |
{rows}

Only their forward pass was compared, because they do not generate text token by token: {forward_only}.

## What does not work

{broken}
"""


@needs_its_own_version
def test_models_doc_is_what_ran(request: pytest.FixtureRequest) -> None:
    if len(RAN) < len(FAMILIES) + len(FORWARD_ONLY):
        pytest.skip("not all families ran, or not all passed")
    # tests/test_families_stored.py writes another section behind this one.
    text, mark, rest = DOC.read_text().partition(FORMS)
    if request.config.getoption("--update-docs"):
        DOC.write_text(_document() + (f"\n{mark}{rest}" if mark else ""))
    assert text.rstrip() == _document().rstrip() or request.config.getoption("--update-docs"), (
        "docs/models.md is old: run pytest tests/test_families.py --update-docs"
    )
