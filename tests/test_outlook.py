"""What `moestro plan` says of models that are not loaded: bytes, verdicts, speeds, and refusals before a download."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hub_server import Repo, hub_server, run_python
from moestro.cli.main import app
from moestro.errors import MoestroError, RequestError
from moestro.loading.outlook import FAST, GOOD, NO, SLOW, USABLE, Outlook, Place, choose, command_of, outlook
from moestro.loading.survey import survey, survey_shape
from moestro.loading.survey.sizes import sized
from moestro.planning.machines import assumed_machine, machine_named, machine_names
from moestro.planning.options import BITS, ModelOptions, Options
from moestro.planning.shapes import REAL_SHAPES, spec_of_shape
from moestro.simulate.forecast import WIDE

GIB = 2**30
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "torch_dtype": "bfloat16",
}


def _place(ram_gib: float = 64, gpu_gib: float | None = None, machine: str = "rtx4090", cores: int = 16) -> Place:
    found = machine_named(machine)
    if gpu_gib is None:
        found = assumed_machine("Intel(R) Xeon(R)", cores, ("avx512f",), int(ram_gib * GIB))
    return Place(found, int(ram_gib * GIB), None if gpu_gib is None else int(gpu_gib * GIB), is_here=False)


def _of_shape(name: str, place: Place, **options: Any) -> Outlook:
    return outlook(None, ModelOptions(shape=name), Options(**options), place)


def _headers(config: dict[str, Any], heavy: int = 1) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of a Mixtral of that config; its experts are `heavy` times as wide."""
    d, f, v = config["hidden_size"], config["intermediate_size"] * heavy, config["vocab_size"]
    sizes: dict[str, list[int]] = {"model.embed_tokens.weight": [v, d], "lm_head.weight": [v, d]}
    sizes["model.norm.weight"] = [d]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sizes |= {f"{at}.input_layernorm.weight": [d], f"{at}.post_attention_layernorm.weight": [d]}
        sizes |= {f"{at}.self_attn.{name}_proj.weight": [d, d] for name in ("q", "o")}
        sizes |= {f"{at}.self_attn.{name}_proj.weight": [d // 2, d] for name in ("k", "v")}
        sizes[f"{at}.block_sparse_moe.gate.weight"] = [config["num_local_experts"], d]
        for expert in range(config["num_local_experts"]):
            of = f"{at}.block_sparse_moe.experts.{expert}"
            sizes |= {f"{of}.w1.weight": [f, d], f"{of}.w3.weight": [f, d], f"{of}.w2.weight": [d, f]}
    return {name: ("BF16", size) for name, size in sizes.items()}


def _safetensors(tensors: dict[str, tuple[str, list[int]]]) -> tuple[bytes, int]:
    """A header, and how many bytes of weights follow it."""
    at, entries = 0, {}
    for name, (dtype, shape) in tensors.items():
        size = 2
        for one in shape:
            size *= one
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text, at


def _folder(path: Path, config: dict[str, Any], heavy: int = 1) -> Path:
    """A checkpoint whose file of weights is a hole on the disk behind a true header."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    header, n_bytes = _safetensors(_headers(config, heavy))
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + n_bytes)
    return path


# ---- bytes


@pytest.mark.parametrize("name", REAL_SHAPES)
def test_a_shape_has_the_sizes_of_its_model(name: str) -> None:
    found, wanted = survey_shape(name, ModelOptions(shape=name)), spec_of_shape(name)
    spec = sized(found, Options(), on_gpu=True).spec
    assert (spec.dense_bytes, spec.dense_weights) == (wanted.dense_bytes, wanted.dense_weights)
    assert [(of.experts, of.expert_bytes) for of in spec.layers] == [
        (of.experts, of.expert_bytes) for of in wanted.layers
    ]


def test_a_file_of_headers_says_what_a_download_would(tmp_path: Path) -> None:
    """Weights of 90 GB that are not there: sizes come from the header alone."""
    config = MIXTRAL | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 16, "num_local_experts": 8}
    found = survey(str(_folder(tmp_path / "big", config)), ModelOptions())
    wanted = spec_of_shape("mixtral-8x7b")
    spec = sized(found, Options(), on_gpu=True).spec
    assert [(of.experts, of.expert_bytes, of.neurons) for of in spec.layers] == [
        (of.experts, of.expert_bytes, of.neurons) for of in wanted.layers
    ]
    assert abs(spec.dense_bytes / wanted.dense_bytes - 1) < 0.2  # it has more key heads
    assert found.weights_bytes > 90e9


def test_fewer_bits_take_fewer_bytes() -> None:
    found = _of_shape("mixtral-8x7b", _place())
    sizes = [one.ram_bytes for bits, one in found.table if bits is not None]
    assert [bits for bits, _ in found.table] == [*BITS, None]
    assert all(more > less for more, less in pairwise(sizes))
    assert found.table[-1][1].ram_bytes == sizes[0]  # its own form has 16 bits


# ---- verdicts


@pytest.mark.parametrize(
    ("shape", "bits", "place", "verdict"),
    [
        ("mixtral-8x7b", 16, _place(64), NO),
        ("mixtral-8x7b", 4, _place(20), NO),
        ("mixtral-8x7b", 4, _place(64, 24), FAST),
        ("olmoe-1b-7b", 4, _place(16), FAST),
        ("mixtral-8x7b", 16, replace(_place(128), machine=machine_named("t4-colab")), SLOW),
        ("mixtral-8x7b", 8, _place(64, cores=6), USABLE),
        ("mixtral-8x7b", 4, _place(64, cores=8), GOOD),
    ],
)
def test_verdicts(shape: str, bits: int, place: Place, verdict: str) -> None:
    found = _of_shape(shape, place, bits=bits)
    assert found.choice.verdict == verdict
    assert found.choice.fits is (verdict != NO)


def test_what_does_not_fit_names_what_would() -> None:
    found = _of_shape("mixtral-8x7b", _place(30), bits=16)
    assert found.choice.plan.why_not is not None
    assert "RAM" in found.choice.plan.why_not
    assert found.best.options.bits == 4
    assert "--bits 4" in command_of(found.survey, found.source, found.best.options)
    assert not _of_shape("mixtral-8x7b", _place(2), bits=2).best.fits


@pytest.mark.parametrize("machine", [name for name in machine_names() if name != "this"])
@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_ranges_are_narrow_and_more_memory_is_no_slower(shape: str, machine: str) -> None:
    before = 0.0
    card = machine_named(machine)
    for share in (0.25, 0.5, 1.0):
        place = Place(card, 200 * GIB, int(card.gpu_bytes * share), is_here=False)
        speeds = choose(survey_shape(shape, ModelOptions(shape=shape)), Options(bits=4, context=512), place).speeds
        if speeds is None:
            continue
        for one in (speeds.decode, speeds.prefill):
            assert 0 < one.low < one.high
            assert one.high - one.middle <= WIDE * one.middle * 1.001
        assert speeds.decode.middle >= before * 0.95  # a little work beside the GPU's can help
        before = speeds.decode.middle
    assert before > 0


def test_gains_are_gains_and_the_largest_first() -> None:
    found = _of_shape("mixtral-8x7b", _place(64), bits=8)
    assert found.gains
    assert all(gain.decode_tok_s > gain.before_tok_s for gain in found.gains)
    assert sorted(found.gains, key=lambda gain: -gain.decode_tok_s) == list(found.gains)
    assert any("GPU" in gain.change for gain in found.gains)


def test_policies_are_told_apart() -> None:
    place = _place(64, 12)
    speeds = {
        name: _of_shape("mixtral-8x7b", place, bits=4, policy=name).choice.speeds
        for name in ("moestro", "layer-streaming", "cpu-only")
    }
    middles = {name: one.decode.middle for name, one in speeds.items() if one is not None}
    assert middles["moestro"] > middles["cpu-only"] > middles["layer-streaming"]


# ---- the command


def test_json_has_what_scripts_read() -> None:
    done = CliRunner().invoke(app, ["plan", "--shape", "mixtral-8x7b", "--machine", "rtx4090", "--bits", "4", "--json"])
    assert done.exit_code == 0
    said = json.loads(done.output.splitlines()[-1])
    assert {"verdict", "decode_tok_s", "prefill_tok_s", "bytes", "command"} <= said.keys()
    assert said["verdict"] == FAST
    assert set(said["bytes"]) == {"gpu", "ram", "disk"}
    low, high = said["decode_tok_s"]
    assert (high - low) / (high + low) <= WIDE * 1.01
    assert said["experts"]["total"] == 256
    assert 0 < said["experts"]["gpu"] < 256
    assert said["bytes"]["gpu"] <= machine_named("rtx4090").gpu_bytes


def test_words_have_a_verdict_a_command_and_a_table() -> None:
    done = CliRunner().invoke(app, ["plan", "--shape", "mixtral-8x7b", "--machine", "rtx4060-laptop"])
    assert done.output.startswith("NO  mixtral-8x7b: ")
    assert "moestro run --shape mixtral-8x7b --bits" in done.output
    assert all(f"│ {bits} " in done.output for bits in BITS)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (None, {}, "name one model"),
        ("nothing/here.gguf", {}, "no folder nothing/here.gguf"),
        ("demo", {"context": 10**6}, "the model's context is 512"),
        ("demo", {"device": "emulated", "head_bits": 4}, "needs the dense layers on the CPU"),
    ],
)
def test_mistakes_are_one_line(model: str | None, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MoestroError, match=says) as error:
        outlook(model, ModelOptions(), Options(**options))
    assert "\n" not in str(error.value)


def test_a_quantized_checkpoint_keeps_its_bits(tmp_path: Path) -> None:
    config = MIXTRAL | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    folder = _folder(tmp_path / "q", config)
    tensors = {}
    for name, (_, shape) in _headers(config).items():
        if "experts" in name:
            blocks = [-(-size // 128) for size in shape]
            tensors |= {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", blocks)}
        else:
            tensors[name] = ("BF16", shape)
    header, _ = _safetensors({name: (d, s) for name, (d, s) in tensors.items()})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 10**7)
    found = outlook(str(folder), ModelOptions(), Options(device="cpu"))
    assert {*found.choice.plan.formats.experts} == {"fp8"}
    assert [bits for bits, _ in found.table] == [None]
    with pytest.raises(MoestroError, match="is quantized already"):
        outlook(str(folder), ModelOptions(), Options(device="cpu", bits=4))


def test_it_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, time\nbegun = time.process_time()\nfrom moestro.cli.main import main\n"
        "sys.argv = ['moestro', 'plan', 'demo', '--json']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'slow imports'\n"
        "assert time.process_time() - begun < 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["verdict"] == FAST


def test_explaining_is_numbered() -> None:
    from moestro.loading.reasons import reasons

    for place, words in ((_place(64), "CPU computes all"), (_place(64, 12), "The policy is `moestro`")):
        said = reasons(_of_shape("mixtral-8x7b", place, bits=4))
        assert len(said) >= 8
        assert any(words in one for one in said)
        assert all(one.endswith(".") for one in said)


# ---- before a download

LOAD = """
import sys
from moestro import load
from moestro.errors import MoestroError
try:
    load(sys.argv[1], device="cpu", **({"ram": sys.argv[2]} if len(sys.argv) > 2 else {}))
except MoestroError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def test_what_cannot_fit_is_not_downloaded(tmp_path: Path) -> None:
    config = MIXTRAL
    header, n_bytes = _safetensors(_headers(config, heavy=4))
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": header + bytes(n_bytes)}
    with hub_server() as hub:
        hub.repos["org/big"] = Repo(files)
        done = run_python(hub, tmp_path, "-c", LOAD, "org/big", "1MiB")
        assert done.returncode == 2, done.stderr
        line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert "was not downloaded" in line
        assert "ram allows 1.0 MiB; give ram at least" in line
        asked = [span for _, path, span in hub.requests if path == "/cdn/org/big/model.safetensors"]
        assert asked, "its header was not read"
        stops = [int(span.rpartition("-")[2]) for span in asked]
        assert max(stops) < len(header), "a byte of the weights was asked for"
        assert not list(tmp_path.rglob("*.part"))


def test_plan_reads_headers_of_the_hub_alone(tmp_path: Path) -> None:
    header, n_bytes = _safetensors(_headers(MIXTRAL, heavy=4))
    files = {"config.json": json.dumps(MIXTRAL).encode(), "model.safetensors": header + bytes(n_bytes)}
    with hub_server() as hub:
        hub.repos["org/big"] = Repo(files)
        done = run_python(hub, tmp_path, "-m", "moestro.cli.main", "plan", "org/big", "--device", "cpu", "--json")
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["to_fetch_bytes"] == len(files["model.safetensors"])
        spans = [span for _, path, span in hub.requests if path.endswith("model.safetensors") and "/cdn/" in path]
        assert max(int(span.rpartition("-")[2]) for span in spans) < len(header)


def test_a_machine_without_a_gpu_refuses_a_gpu_budget() -> None:
    with pytest.raises(RequestError, match="there is no GPU here"):
        outlook("demo", ModelOptions(), Options(device="cpu", gpu_memory="4GiB"))
