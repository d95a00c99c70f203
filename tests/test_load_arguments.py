"""What `moestro.load` is given arrives: at the hub, in Transformers' model, in the conductor. A card shows the rest."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download

from hub_server import Hub, Repo, hub_server
from moestro import MoestroConfig, MoestroError, load, load_tokenizer
from moestro.cli.main import main
from moestro.loading.pack import pack
from moestro.planning.options import ModelOptions, Options
from moestro.planning.policies import POLICIES, BasePolicy
from moestro.planning.policies.lru import Lru

DEMO = Path(str(files("moestro") / "demo"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The demo on a hub under org/demo, in revision v2, whose cache is nowhere else than asked for."""
    with hub_server() as server:
        own = Repo({path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()}, revision="v2")
        server.repos["org/demo"] = own
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no such cache"))
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield server


def test_revision_token_cache_and_no_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache: dict[str, Any] = {"revision": "v2", "cache_dir": tmp_path / "cache"}
    with pytest.raises(MoestroError, match=r"no revision v2 of it; leave local_files_only=True out to download it"):
        load("org/demo", local_files_only=True, **cache)
    assert not hub.requests
    load_tokenizer("org/demo", token="hf_abc", **cache)
    load("org/demo", device="cpu", threads=1, token="hf_abc", **cache).moestro.close()
    asked = {path for _, path, _ in hub.requests if path.startswith("/api/models/")}
    assert asked == {"/api/models/org/demo/revision/v2"}
    of_hub = {token for path, token in hub.tokens if path.startswith(("/api/models/", "/org/demo/"))}
    assert of_hub == {"Bearer hf_abc"}
    commit = hub.repos["org/demo"].commit
    assert (tmp_path / "cache" / "models--org--demo" / "snapshots" / commit / "model.safetensors").exists()
    assert not (tmp_path / "no such cache").exists()

    hub.requests.clear()
    load_tokenizer("org/demo", local_files_only=True, **cache)
    load("org/demo", device="cpu", threads=1, local_files_only=True, **cache).moestro.close()
    assert not hub.requests

    monkeypatch.setattr(sys, "argv", ["moestro", "inspect", "org/demo", "--revision", "v2", "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)["model_revision"] == commit


def test_a_token_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    load("demo", device="cpu", threads=1, token="hf_abc").moestro.close()
    assert [line for line in caplog.messages if line.startswith("token changes nothing here")]
    assert "hf_abc" not in caplog.text + repr(ModelOptions(token="hf_abc"))


@pytest.mark.parametrize("of", ["checkpoint", "shape", "packed"])
def test_attention_is_computed_by_what_was_asked_for(of: str, tmp_path: Path) -> None:
    if of == "packed":
        pack("demo", tmp_path / "packed", ModelOptions(), Options())
    given: dict[str, Any] = {"shape": "tiny"} if of == "shape" else {"model": "demo"}
    given = {"model": str(tmp_path / "packed")} if of == "packed" else given
    model = load(**given, device="cpu", threads=1, attn_implementation="eager")
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    model.moestro.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wishful", "attn_implementation='wishful': Transformers has eager, .*sdpa"),
        ("flash_attention_2", "attn_implementation='flash_attention_2': Transformers has eager"),
        ("paged|eager", r"attn_implementation='paged\|eager': Transformers has eager"),
        ("org/kernels", "is a kernel from the hub, which is code; read it, then give trust_remote_code=True"),
    ],
)
def test_attention_that_cannot_be_had(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(MoestroError, match=says):
        load(shape="tiny", device="cpu", attn_implementation=name)


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu"), torch.device("cpu", 0)], ids=str)
def test_a_device_of_torch(device: Any) -> None:
    assert Options(device=device).device == MoestroConfig(device=device).device == "cpu"


def test_the_first_gpu_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for first in ("cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        assert Options(device=first).device == "cuda"
    for other in ("cuda:1", torch.device("cuda", 1)):
        with pytest.raises(MoestroError, match="'cuda:1': Moestro takes one GPU, the first; set CUDA_VISIBLE_DEVICES"):
            Options(device=other)
    with pytest.raises(MoestroError, match="no device 'meta'; there are: auto, cpu"):
        Options(device=torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    with pytest.raises(MoestroError, match=r"call torch.cuda.set_device\(0\) first"):
        Options(device=torch.device("cuda:0"))


class Noting(Lru):
    """Notes the phases of the steps that it decided about."""

    name = "noting"

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def decide(self, step: Any, view: Any, costs: Any) -> Any:
        self.steps.append(step.phase.value)
        return super().decide(step, view, costs)


def test_a_policy_object_decides_itself() -> None:
    policy = Noting()
    model = load("demo", device="emulated", gpu_memory="24MiB", policy=policy, threads=1)
    assert model.moestro.policy is policy
    assert policy.slots == len(model.moestro.slots)  # its last placement is the plan's
    with torch.no_grad():
        model(torch.arange(3, 9)[None])
    assert policy.steps == ["prefill"] * len(model.moestro.spec.layers)
    model.moestro.close()


@pytest.mark.parametrize("given", [BasePolicy, Lru, object(), ["lru"]], ids=["BasePolicy", "Lru", "object", "list"])
def test_what_is_no_policy(given: Any) -> None:
    with pytest.raises(MoestroError, match=r"^policy is (the class (BasePolicy|Lru); give an object|of type )"):
        Options(policy=given)


def test_a_config_with_a_policy_object_is_written_with_its_name() -> None:
    config = MoestroConfig(policy=Noting())
    assert copy.deepcopy(config) == config
    assert copy.deepcopy(config).policy is config.policy  # as `from_pretrained` copies it
    assert json.loads(config.to_json_string())["policy"] == "noting"
    assert {name for name in POLICIES if Options(policy=POLICIES[name]()).policy.name != name} == set()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"device": "cpu"}, ["experts .* in bf16", "GPU +none: all runs on the CPU", "CPU +1 threads, "]),
        (
            {"device": "emulated", "gpu_memory": "24MiB", "policy": "lru"},
            [r"GPU +emulated, \d+ slots of 432\.\d KiB, 0 experts held", "GPU plan .*24.0 MiB: dense", "policy +lru"],
        ),
    ],
    ids=["cpu", "emulated"],
)
def test_a_conductor_prints_a_card(given: dict[str, Any], says: list[str]) -> None:
    model = load("demo", threads=1, **given)
    card = str(model.moestro)
    assert repr(model.moestro) == card
    assert 5 <= len(card.splitlines()) <= 12
    assert "6 MoE layers of 8 experts" in card
    assert "48 experts, 20.2 MiB" in card
    assert all(re.search(each, card) for each in says), card
    model.moestro.close()
