"""Checkpoints from the hub: which files are chosen, fetched and kept, and what is said where that fails.

A server on this machine plays the hub; huggingface_hub is the real one, in a process of its own.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_server import PAGE, Hub, Repo, hub_server, run_python
from moestro.errors import MoestroError
from moestro.loading.choose import beside_weights, choose_gguf, choose_safetensors
from moestro.loading.hub import find_files

FETCH = """
import sys
import moestro.loading.download as download
from moestro.errors import MoestroError
from moestro.loading.hub import find_files
download._WAIT_S, download.SMALL_BYTES = 0.01, 0
try:
    print(download.fetch(find_files(sys.argv[1], *sys.argv[2:])))
except MoestroError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
assert "torch" not in sys.modules
"""
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        hub.repos["org/gguf"] = Repo({"m-Q4_K_M.gguf": WEIGHTS, "m-Q8_0.gguf": WEIGHTS * 2, "README.md": b"hello"})
        yield hub


def fetch(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(hub, home, "-c", FETCH, *arguments, **environment)


def fails(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if " free" not in line or line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


# --- choosing by name


NAMES = [
    "config.json",
    "Big-Q4_K_M.gguf",
    "Big-UD-Q4_K_XL.gguf",
    "UD-Q2_K_XL/Big-UD-Q2_K_XL-00001-of-00002.gguf",
    "UD-Q2_K_XL/Big-UD-Q2_K_XL-00002-of-00002.gguf",
    "Q8_0/Big-Q8_0-00001-of-00003.gguf",
    "Q8_0/Big-Q8_0-00003-of-00003.gguf",
    "big.IQ4_XS.gguf",
    "Big-BF16.gguf",
    "mmproj-F16.gguf",
    "imatrix_unsloth.gguf",
    "Big-Q5_K_M.gguf",
    "other/Big-Q5_K_M.gguf",
]


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("Q4_K_M", ["Big-Q4_K_M.gguf"]),
        ("q4_k_m", ["Big-Q4_K_M.gguf"]),
        ("Big-Q4_K_M.gguf", ["Big-Q4_K_M.gguf"]),
        ("UD-Q4_K_XL", ["Big-UD-Q4_K_XL.gguf"]),
        ("Q4_K_XL", ["Big-UD-Q4_K_XL.gguf"]),
        ("ud-q2_k_xl", [f"UD-Q2_K_XL/Big-UD-Q2_K_XL-0000{part}-of-00002.gguf" for part in (1, 2)]),
        ("IQ4_XS", ["big.IQ4_XS.gguf"]),
        ("BF16", ["Big-BF16.gguf"]),
    ],
)
def test_a_quantization_names_its_files(quant: str, expected: list[str]) -> None:
    assert choose_gguf("org/big", NAMES, quant) == expected


@pytest.mark.parametrize(
    ("names", "quant", "says"),
    [
        (NAMES, "Q3_K_M", "has no GGUF file Q3_K_M; there are BF16, IQ4_XS, Q4_K_M, Q5_K_M, Q8_0, UD-Q2_K_XL, UD-Q4"),
        (NAMES, "F16", "has no GGUF file F16"),  # an mmproj file is none
        (NAMES, "Q4_K", "has no GGUF file Q4_K;"),
        (NAMES, "Q8_0", "lacks part 2 of 3 of Q8_0/Big-Q8_0.gguf"),
        (NAMES, "Q5_K_M", "has 2 GGUF files Q5_K_M; name one, as org/big:FILE: Big-Q5_K_M.gguf, other/Big-Q5_K_M.gguf"),
        (NAMES, None, "has 8 GGUF files; name one, as org/big:NAME; there are BF16, IQ4_XS"),
        (["config.json", "model.safetensors"], "Q4_K_M", "has no GGUF file, so no Q4_K_M; leave :Q4_K_M out"),
        (["mmproj-F16.gguf"], None, "has no GGUF file"),
    ],
)
def test_a_quantization_that_names_no_file_or_two(names: list[str], quant: str | None, says: str) -> None:
    with pytest.raises(MoestroError) as error:
        choose_gguf("org/big", names, quant)
    assert says in str(error.value)


def test_only_files_that_a_safetensors_checkpoint_needs() -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json", "README.md"]
    names += ["model-1.safetensors", "model-2.safetensors", "pytorch_model.bin", "original/config.json"]
    names += ["metal/model.bin", "original/model.safetensors", "consolidated.safetensors", "m-Q4_K_M.gguf"]
    assert choose_safetensors("m", names, lambda name: index) == ["model-1.safetensors", "model-2.safetensors"]
    assert beside_weights(names) == names[:4]
    with pytest.raises(MoestroError, match=r"m lacks model-2.safetensors, which its index names"):
        choose_safetensors("m", set(names) - {"model-2.safetensors"}, lambda name: index)
    with pytest.raises(MoestroError, match="is no index of weights"):
        choose_safetensors("m", names, lambda name: b"[]")


@given(st.lists(st.text(alphabet="Q4_KM-./0125of8ggufUD", max_size=30).map(lambda text: f"{text}.gguf")), st.text())
def test_any_names_are_chosen_among_or_refused(names: list[str], quant: str) -> None:
    with suppress(MoestroError):
        assert set(choose_gguf("m", names, quant)) <= set(names)


def test_a_file_and_a_folder_here(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        (tmp_path / f"m-Q8_0-0000{part}-of-00003.gguf").write_bytes(b"x")
    first = tmp_path / "m-Q8_0-00001-of-00003.gguf"
    assert len(find_files(str(first)).weights) == 3
    assert find_files(str(tmp_path)).path(tmp_path) == first
    with pytest.raises(MoestroError, match=r"is part 2 of 3; name the first, m-Q8_0-00001-of-00003.gguf"):
        find_files(str(tmp_path / "m-Q8_0-00002-of-00003.gguf"))
    (tmp_path / "m-Q8_0-00003-of-00003.gguf").unlink()
    with pytest.raises(MoestroError, match=r"lacks part 3 of 3 of m-Q8_0\.gguf"):
        find_files(str(first))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoestroError, match="has no weights"):
        find_files(str(tmp_path / "empty"))


# --- fetching


@pytest.mark.parametrize(
    "name",
    [
        "hf.co/org/gguf:Q4_K_M",
        pytest.param("org/gguf:q4_k_m", marks=pytest.mark.long),
        pytest.param("https://huggingface.co/org/gguf:Q4_K_M", marks=pytest.mark.long),
    ],
)
def test_one_gguf_file_is_fetched_once(hub: Hub, tmp_path: Path, name: str) -> None:
    done = fetch(hub, tmp_path, name)
    assert done.returncode == 0, done
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS
    assert "1.0 MiB in 1 file, 0 B already here" in done.stderr
    assert hub.fetched() == ["/cdn/org/gguf/m-Q4_K_M.gguf"]
    again = fetch(hub, tmp_path, name)
    assert again.stdout == done.stdout
    assert not again.stderr
    assert len(hub.fetched()) == 1


def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/gguf"].revision = "v2"
    assert fetch(hub, tmp_path, "org/gguf:Q4_K_M", "v2").returncode == 0
    assert "org/gguf has no revision main" in fails(fetch(hub, tmp_path, "org/gguf:Q4_K_M"))


def test_a_cut_connection_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/gguf"].gives = 300_000
    done = fetch(hub, tmp_path, "org/gguf:Q4_K_M")
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS, done
    ranges = [asked for method, path, asked in hub.requests if path.startswith("/cdn/")]
    assert ranges == ["bytes=0-", "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_what_came_before_a_failure_is_kept(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos["org/gguf"]
    part = tmp_path / "hub" / "models--org--gguf" / "blobs"
    part.mkdir(parents=True)
    blob = json.loads(repo.info(""))["siblings"][0]["lfs"]["sha256"]
    (part / f"{blob}.part").write_bytes(WEIGHTS[:700_000])
    repo.gives = 0
    line = fails(fetch(hub, tmp_path, "org/gguf:Q4_K_M"))
    assert "was cut 5 times at 683.6 KiB of 1.0 MiB of m-Q4_K_M.gguf" in line
    assert "what came is kept: run again to go on" in line
    repo.gives = None
    hub.requests.clear()
    done = fetch(hub, tmp_path, "org/gguf:Q4_K_M")
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS
    assert "683.6 KiB already here" in done.stderr
    assert [asked for _, path, asked in hub.requests if path.startswith("/cdn/")] == ["bytes=700000-"]


def test_a_server_without_ranges_begins_again(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos["org/gguf"]
    repo.ranges, repo.gives = False, 1 << 19
    assert "was cut 5 times" in fails(fetch(hub, tmp_path, "org/gguf:Q4_K_M"))
    repo.gives = None
    assert Path(fetch(hub, tmp_path, "org/gguf:Q4_K_M").stdout.strip()).read_bytes() == WEIGHTS


@pytest.mark.long
def test_a_safetensors_checkpoint_runs_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    demo = Path(str(files("moestro") / "demo"))
    hub.repos["org/demo"] = Repo({path.name: path.read_bytes() for path in demo.iterdir() if path.is_file()})
    command = (
        "-m",
        "moestro.cli.main",
        "run",
        "org/demo",
        "Once",
        "-n",
        "4",
        "--temperature",
        "0",
        "--json",
        "-t",
        "1",
    )
    done = run_python(hub, tmp_path, *command)
    assert done.returncode == 0, done
    assert "already here" not in done.stderr  # --json is quiet
    here = run_python(hub, tmp_path, *command[:3], "demo", *command[4:])
    assert json.loads(done.stdout)["text"] == json.loads(here.stdout)["text"]
    assert len([path for _, path, _ in hub.requests if path.startswith("/api/models/")]) == 1
    hub.repos.clear()
    offline = run_python(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout)["text"] == json.loads(here.stdout)["text"]


def test_the_cache_serves_without_a_connection(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/gguf:Q4_K_M")
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert fetch(hub, tmp_path, "org/gguf:Q4_K_M", **environment).stdout == done.stdout
        assert "there are Q4_K_M" in fails(fetch(hub, tmp_path, "org/gguf:Q8_0", **environment))
        line = fails(fetch(hub, tmp_path / "empty", "org/gguf:Q4_K_M", **environment))
        assert line.startswith("error: no model org/gguf: no folder of that name here")


MISTYPED = """
import contextlib, io, json, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "transformers", "numpy"), name
sys.meta_path.insert(0, Refused())
from moestro.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv, errors = ["moestro", *arguments], io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            print(json.dumps([end.code, errors.getvalue()]))
"""


def test_a_mistyped_name_is_asked_for_once_and_answered_before_torch(hub: Hub, tmp_path: Path) -> None:
    """Whether the hub answers, or each connection ends as it begins."""
    name = "org/mistyped"
    ways = [["run", name, "x"], ["chat", name], ["trace", name, "--text", __file__], ["inspect", name]]
    ways += [["run", "demo", "x", option, name] for option in ("--config", "--tokenizer", "--draft")]
    ways += [["pack", name, "-o", str(tmp_path / "out")], ["bench", "recall", name], ["bench", "quantization", name]]
    ended: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def end_connections() -> None:
            with suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        ended.append(connection.recv(1000))

        Thread(target=end_connections, daemon=True).start()
        nowhere = f"http://127.0.0.1:{server.getsockname()[1]}"
        for endpoint, says in ((hub.url, "check the name, or set HF_TOKEN"), (nowhere, "there is no connection to")):
            done = run_python(hub, tmp_path, "-c", MISTYPED, json.dumps(ways), HF_ENDPOINT=endpoint)
            found = [json.loads(line) for line in done.stdout.splitlines()]
            assert len(found) == len(ways), done.stderr
            for way, (code, line) in zip(ways, found, strict=True):
                assert code == 2, (way, line)
                assert line.startswith(f"error: no model {name}: no folder of that name here")
                assert says in line
                assert line.count("\n") == 1
    of_model = f"/api/models/{name}/"  # beside it huggingface_hub asks for something of its own
    assert len([path for _, path, _ in hub.requests if of_model in path]) == len(ways)
    assert len([asked for asked in ended if of_model.encode() in asked]) == len(ways)


# --- one line where it fails


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"says": (401, "RepoNotFound")},
            "does not exist or is private, which look alike; check the name, or set HF_T",
        ),
        (
            {"says": (404, "RepoNotFound")},
            "does not exist or is private, which look alike; check the name, or set HF_T",
        ),
        ({"says": (401, "")}, "does not exist or is private"),
        ({"says": (403, "")}, "the hub refuses org/gguf (403): accept its terms at https://hf.co/org/gguf"),
        (
            {"says": (403, "GatedRepo")},
            "org/gguf is gated: accept its terms at https://hf.co/org/gguf, then set HF_TOK",
        ),
        ({"resolve_says": (403, "GatedRepo")}, "org/gguf is gated: accept its terms"),
        ({"resolve_says": (401, "GatedRepo")}, "org/gguf is gated: accept its terms"),
        ({"says": (503, "")}, "the hub answers 503 for org/gguf; try again later"),
        ({"resolve_says": (503, "")}, "was cut 5 times"),
        ({"silent": True}, "there is no connection to http://127.0.0.1"),
        ({"listing": PAGE}, "is not what a hub would"),
        ({"listing": b"[]"}, "is not what a hub would"),
        ({"listing": b"{}"}, "is not what a hub would"),
        ({"listing": b'{"id": "a", "sha": "../..", "siblings": [{"rfilename": "x"}]}'}, "is not what a hub would"),
        ({"contents": PAGE}, "is not what a hub would"),
        ({"contents": b""}, "is not what a hub would"),
        ({"sizes": {"m-Q4_K_M.gguf": 10}}, "is not what a hub would"),
        ({"sizes": {"m-Q4_K_M.gguf": 1 << 60}}, "does not fit on the disk of"),
    ],
)
def test_a_hub_that_gives_nothing(hub: Hub, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    for name, value in change.items():
        setattr(hub.repos["org/gguf"], name, value)
    assert says in fails(fetch(hub, tmp_path, "org/gguf:Q4_K_M"))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/other", "no model org/other: no folder of that name here, and on the hub it does not exist"),
        ("org/gguf:Q3_K_M", "has no GGUF file Q3_K_M; there are Q4_K_M, Q8_0"),
        ("org/gguf", "has 2 GGUF files; name one, as org/gguf:NAME; there are Q4_K_M, Q8_0"),
        ("org--x/..y", "it is no hub id either"),
        ("a/b/c", "no folder a/b/c"),
        ("nowhere.gguf", "no folder nowhere.gguf"),
    ],
)
def test_a_name_that_is_no_model(hub: Hub, tmp_path: Path, name: str, says: str) -> None:
    assert says in fails(fetch(hub, tmp_path, name))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")
def test_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    blob = json.loads(hub.repos["org/gguf"].info(""))["siblings"][0]["lfs"]["sha256"]
    blobs = tmp_path / "hub" / "models--org--gguf" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{blob}.part").symlink_to("/dev/full")
    assert "is full; what came of org/gguf:Q4_K_M is kept" in fails(fetch(hub, tmp_path, "org/gguf:Q4_K_M"))
