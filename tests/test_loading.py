"""Which class a checkpoint is loaded with, under which names its tensors are found, and whose code is run."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

import moestro
from commands import COMMANDS
from families import FAMILIES, Family, build_config, random_ids, save_model
from moestro import MoestroError, load, load_tokenizer
from moestro.cli import main as cli
from moestro.loading.checkpoint import wrong_prefix
from moestro.loading.model import _auto_class

DEMO = Path(moestro.__file__).parent / "demo"
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 1, "dtype": "float32"}

WRONG_NAMES = (
    "MixtralModel",
    "NoSuchForCausalLM",
    "MixtralForTokenClassification",
    "LlamaForCausalLM",
    "Qwen2MoeForCausalLM",
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "PreTrainedModel",
    "AutoConfig",
    "logging",
    "",
)
# Families whose text model can be loaded by itself from a checkpoint of the whole.
TEXT_OF_WHOLE = {
    "dots3_note": "Dots3NoteForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen4_exp": "Qwen4ExpForCausalLM",
}


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_class_goes_by_the_model_type(family: Family) -> None:
    config = build_config(family)
    for named in ([], None, *([name] for name in WRONG_NAMES), list(WRONG_NAMES)):
        config.architectures = named
        assert _auto_class(config) is getattr(transformers, family.auto), named
    if family.name in TEXT_OF_WHOLE:
        config.architectures = [WRONG_NAMES[0], TEXT_OF_WHOLE[family.name]]
        assert _auto_class(config) is AutoModelForCausalLM


@pytest.mark.parametrize("named", [5, "MixtralModel", [5], [None], [["MixtralModel"]], {"MixtralModel": 1}])
def test_a_list_of_classes_that_is_none_does_no_harm(named: Any) -> None:
    config = build_config(next(family for family in FAMILIES if family.name == "mixtral"))
    config.architectures = named
    assert _auto_class(config) is AutoModelForCausalLM


@pytest.mark.parametrize("name", ["MixtralModel", "T5ForConditionalGeneration"])
@torch.no_grad()
def test_a_checkpoint_that_names_another_class_gives_transformers_own_text(name: str, tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    _edit(tmp_path / "config.json", architectures=[name])
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).generate(random_ids(), **greedy)
    assert torch.equal(load(str(tmp_path), **ON_CPU).generate(random_ids(), **greedy), expected)


@torch.no_grad()
def test_the_text_model_of_a_whole_is_loaded_where_it_is_named(tmp_path: Path) -> None:
    save_model("qwen3_5_moe", tmp_path)
    _edit(tmp_path / "config.json", architectures=[TEXT_OF_WHOLE["qwen3_5_moe"]])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load(str(tmp_path), **ON_CPU)
    assert isinstance(model, type(expected))
    assert torch.allclose(model(random_ids()).logits, expected(random_ids()).logits, atol=1e-4)


# family -> (what stands before some names, what stands there instead)
PREFIXES = [
    *(("mixtral", "", new) for new in ("module.", "base_model.model.", "language_model.", "_orig_mod.", "model.")),
    *(("mixtral", "model.", new) for new in ("", "transformer.", "model.language_model.")),
    ("qwen3_5_moe", "", "model."),
    ("qwen3_5_moe", "model.language_model.", "model."),
    ("aria", "", "module."),
    ("bailing_hybrid", "model.", ""),
]


@pytest.mark.parametrize(("name", "old", "new"), PREFIXES)
@torch.no_grad()
def test_tensors_whose_names_begin_otherwise(name: str, old: str, new: str, tmp_path: Path) -> None:
    """Loaded where Transformers finds all of them, and else told as what it is."""
    save_model(name, tmp_path)
    path = tmp_path / "model.safetensors"
    renamed = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    auto = _auto_class(AutoConfig.from_pretrained(tmp_path))
    reference, info = auto.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    if not info["missing_keys"]:
        assert torch.allclose(
            load(str(tmp_path), **ON_CPU)(random_ids()).logits, reference(random_ids()).logits, atol=1e-4
        )
        return
    with pytest.raises(MoestroError) as refused:
        load(str(tmp_path), **ON_CPU)
    parts = [f"begin with '{prefix}'" if prefix else "have no prefix" for prefix in (new, old)]
    assert f"the names of its tensors {parts[0]}, but those of its model {parts[1]}; rename them" in str(refused.value)


def test_names_in_pickled_weights_are_looked_at_too(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    torch.save({f"module.{name}": tensor for name, tensor in load_file(path).items()}, tmp_path / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(MoestroError, match=r"the names of its tensors begin with 'module\.'"):
        load(str(tmp_path), **ON_CPU)


LAYERS = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("q_proj", "k_proj", "norm", "mlp.gate")]
NAMES = ["model.embed_tokens.weight", *LAYERS, "lm_head.weight"]
PREFIX = st.lists(st.text("abc_", min_size=1, max_size=4), max_size=3).map(
    lambda parts: "".join(f"{p}." for p in parts)
)


@given(found=PREFIX, wanted=PREFIX, lost=st.sets(st.sampled_from(NAMES), max_size=6), experts=st.integers(0, 40))
def test_a_wrong_prefix_is_found_whatever_it_is(found: str, wanted: str, lost: set[str], experts: int) -> None:
    has = [found + name for name in NAMES if name not in lost]
    has += [f"{found}model.layers.0.experts.{i}.w1.weight" for i in range(experts)]
    pair = wrong_prefix(has, [wanted + name for name in NAMES])
    if found == wanted:
        assert pair is None  # some are missing, which is no matter of prefixes
    else:
        assert pair is not None
        was, should = pair
        assert {should + name.removeprefix(was) for name in has} >= {wanted + name for name in NAMES} - {
            wanted + name for name in lost
        }


CODE = """
from pathlib import Path
open({mark!r}, "a").close()
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
class OwnConfig(MixtralConfig):
    model_type = "ownmoe"
class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **given):
    raise AssertionError("code of the checkpoint")
"""


@dataclass(frozen=True)
class Coded:
    """A checkpoint that brings code, and the file that shows whether any of it ran."""

    folder: Path
    mark: Path


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Coded:
    """A small Mixtral with the demo's tokenizer and files of code that nothing names yet; whoever asks fails."""
    folder, mark = tmp_path / "checkpoint", tmp_path / "ran"
    save_model("mixtral", folder, {"vocab_size": 4096})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    code = CODE.format(mark=str(mark))
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    return Coded(folder, mark)


def _own_family(folder: Path) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    _edit(folder / "config.json", model_type="ownmoe", auto_map=auto_map, architectures=["OwnForCausalLM"])
    path = folder / "model.safetensors"  # under the names of the model: no conversion knows the family
    tensors = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder.parent / "plain")).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _own_class(folder: Path) -> None:
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"}, architectures=["M"])


def _own_config(folder: Path) -> None:
    _edit(folder / "config.json", auto_map={"AutoConfig": "own.OwnConfig"})


def _own_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    _edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")


def _needed_tokenizer(folder: Path) -> None:
    """Of a family for which Transformers knows no tokenizer."""
    build_config(next(family for family in FAMILIES if family.name == "gpt_oss")).save_pretrained(folder)
    _own_tokenizer(folder)


def _foreign_code(folder: Path) -> None:
    _edit(folder / "config.json", model_type="ownmoe", auto_map={"AutoConfig": "other/repository--own.OwnConfig"})


def _hub_kernel(folder: Path) -> None:
    _edit(folder / "config.json", attn_implementation="somebody/attention")


def _hub_kernel_of_a_part(folder: Path) -> None:
    build_config(next(family for family in FAMILIES if family.name == "qwen3_vl_moe")).save_pretrained(folder)
    _edit(folder / "config.json", attn_implementation={"vision_config": "somebody/attention"})


def _paged_attention(folder: Path) -> None:
    _edit(folder / "config.json", attn_implementation="paged|eager")


def _adapter(folder: Path) -> None:
    _edit(folder / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA")


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "a")


def _payload(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(folder.parent / "ran")))


# What a checkpoint brings -> the line that refuses it; None where Transformers does without it, and so do we.
BROUGHT: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "a family of its own": (_own_family, "needs code of its own"),
    "code in another repository": (_foreign_code, "needs code of its own"),
    "a tokenizer of its own": (_needed_tokenizer, "needs code of its own"),
    "a kernel from the hub": (_hub_kernel, "asks for an attention kernel from the hub (somebody/attention)"),
    "a kernel from the hub for a part": (_hub_kernel_of_a_part, "kernel from the hub (somebody/attention)"),
    "a server's attention": (_paged_attention, "only a server runs"),
    "an adapter": (_adapter, "holds a PEFT adapter (adapter_config.json)"),
    "code in a pickle": (_payload, "cannot be loaded"),
    "a class for a known family": (_own_class, None),
    "a config for a known family": (_own_config, None),
    "a tokenizer for a known family": (_own_tokenizer, None),
    "a generate of its own": (lambda folder: None, None),
}


REFUSED = [(what, command) for what in BROUGHT if BROUGHT[what][1] for command in ("run", "trace", "chat")]
DONE_WITHOUT = [(what, "run") for what in BROUGHT if not BROUGHT[what][1]]


@pytest.mark.parametrize(("what", "command"), REFUSED + DONE_WITHOUT)
def test_no_code_of_a_checkpoint_is_run_unasked(
    what: str, command: str, coded: Coded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring, says = BROUGHT[what]
    shutil.copytree(coded.folder, coded.folder.parent / "plain")
    bring(coded.folder)
    text = coded.folder.parent / "text.txt"
    text.write_text("Once upon a time there was a little girl who went into the wood and met a wolf. " * 9)
    rest = {"run": ["Once", "-n", "2"], "trace": ["--text", str(text), "--tokens", "2"], "chat": []}[command]
    monkeypatch.setattr(sys, "argv", ["moestro", command, str(coded.folder), "--device", "cpu", *rest])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert not coded.mark.exists()
    if says is None:
        assert not end.value.code
    else:
        assert end.value.code == 2
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert says in lines[0]


@torch.no_grad()
def test_code_that_is_trusted_is_run(coded: Coded) -> None:
    shutil.copytree(coded.folder, coded.folder.parent / "plain")
    _own_family(coded.folder)
    _own_tokenizer(coded.folder)
    shutil.rmtree(coded.folder / "custom_generate")
    expected = AutoModelForCausalLM.from_pretrained(coded.folder, dtype=torch.float32, trust_remote_code=True)
    model = load(str(coded.folder), trust_remote_code=True, **ON_CPU)
    assert type(model).__name__ == "OwnForCausalLM"
    assert model.moestro.store.n_bytes
    assert torch.allclose(model(random_ids()).logits, expected(random_ids()).logits, atol=1e-4)
    tokenizer = load_tokenizer(str(coded.folder), trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"
    with pytest.raises(MoestroError, match="needs code of its own"):  # trust in one load is not trust in the next
        load(str(coded.folder), **ON_CPU)


def test_every_command_that_loads_a_model_can_be_told_to_trust_it() -> None:
    options = {names: {each.name for each in one.params} for names, one in COMMANDS.items()}
    loading = {names for names, found in options.items() if "model" in found} - {("plan",)}  # which reads headers alone
    assert loading >= {("run",), ("chat",), ("trace",), ("serve",), ("bench", "policies")}
    assert all("trust_remote_code" in options[names] for names in loading)
