"""An option is one field: commands, `load` and `MoestroConfig` have its name, default, help and check from there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from inspect import signature
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from commands import COMMANDS
from moestro import MoestroConfig, MoestroError, load
from moestro.bench.options import CellOptions, ComparedOptions, ShapeOptions, TableOptions
from moestro.cli import main as cli
from moestro.cli.options import takes_options
from moestro.errors import RequestError
from moestro.planning.option import Checked, about, check_names, name_of, needs, option, shows_options
from moestro.planning.options import ModelOptions, Options, ReplayOptions
from moestro.planning.spelling import flag
from moestro.text.options import TextOptions

WRONG: dict[str, tuple[Any, str]] = {
    "gpu_memory": ("much", "--gpu-memory 'much' is no amount of memory; write it like 12GiB, 500MB or 1073741824"),
    "ram": ("lots", "--ram 'lots' is no amount of memory"),
    "context": (0, "--context 0: needs at least 2, a token of prompt and of answer"),
    "sequences": (65, "--sequences 65: needs 1 to 64"),
    "policy": ("wishful", "no policy 'wishful'; there are: bandwidth-split, cpu-only"),
    "device": ("tpu", "no device 'tpu'; there are: auto, cpu, cuda, emulated"),
    "link": ("quick", "--link 'quick' is no rate; write it like 12GB/s"),
    "machine": ("abacus", "no machine 'abacus'; there are: t4-colab"),
    "clock": ("sun", "no clock 'sun'; there are: wall, virtual"),
    "threads": (0, "--threads 0: needs 1 to "),
    "bits": (5, "--bits 5: there are 16, 8, 4"),
    "expert_bits": (5, "--expert-bits 5: there are 16, 8, 4, 3, 2"),
    "dense_bits": (5, "--dense-bits 5: there are 16, 8, 4, 3, 2"),
    "head_bits": (5, "--head-bits 5: there are 16, 8, 4, 3, 2"),
    "fit": ("gptq", "no fit 'gptq'; there are: hqq, none"),
    "transcode": (4, "--transcode 4: there are 8"),
    "profile": (" ", "--profile ' ': needs a file"),
}
RIGHT: dict[str, tuple[Any, ...]] = {  # of each option with a check; also at the edges of what it takes
    "gpu_memory": ("560KiB", "12GiB", "1.5 GB", 1 << 40, 0),
    "ram": ("48GiB", "1KiB", "34000000001", 0),
    "context": (2, 100_000),
    "sequences": (1, 64),
    "policy": ("lru", "fiddler"),
    "device": ("cpu", "emulated"),
    "link": ("12GB/s", 0.5),
    "machine": ("rtx4090",),
    "clock": ("wall",),  # virtual needs other options beside it
    "threads": (1,),
    "bits": (16, 8, 4, 3, 2),
    "expert_bits": (16, 2),
    "dense_bits": (16, 2),
    "head_bits": (16, 2),
    "fit": ("hqq", "none"),
    "transcode": (8,),
    "profile": ("a.trace",),
    "shape": ("tiny",),
    "revision": ("main",),
    "config": ("org/other",),
    "tokenizer": ("demo",),
    "dtype": ("auto", "float16"),
    "cache_dir": ("/data/hub",),
    "attn_implementation": ("eager", "sdpa"),
    "seed": (0, 2**63 - 1),
}
WRONG_SOURCE: dict[str, tuple[Any, str]] = {
    "shape": ("huge", "no shape 'huge'; there are: deepseek-v3"),
    "revision": ("", "--revision '': needs a branch, tag or commit"),
    "config": (" ", "--config ' ': needs a model's name"),
    "tokenizer": ("", "--tokenizer '': needs a model's name"),
    "dtype": ("int3", "no dtype 'int3'; there are: auto, float32"),
    "seed": (-1, "--seed -1: needs 0 or more, below 2**63"),
}
WRONG_OF_LOAD: dict[str, tuple[Any, str]] = {  # of its own arguments, which the command line does not have
    "token": (5, "token=5: needs a text or True or False"),
    "cache_dir": (" ", "cache_dir=' ': needs a folder"),
    "local_files_only": ("yes", "local_files_only='yes': needs True or False"),
    "attn_implementation": ("", "attn_implementation='': needs a name that Transformers has"),
    "policy": (
        [],
        "policy is of type list, which lacks place, begin, decide, observe, bound, name, lookahead; name",
    ),
    "device": ("cuda:1", "device='cuda:1': Moestro takes one GPU, the first; set CUDA_VISIBLE_DEVICES"),
}
WRONG_TEXT: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (0, "--max-new-tokens 0: needs at least 1"),
    "temperature": (-1.0, "--temperature -1.0: needs 0, or at least 0.01"),
    "top_p": (2.0, "--top-p 2.0: needs above 0 and at most 1"),
    "top_k": (-1, "--top-k -1: needs 0 (off) or more"),
    "min_p": (1.5, "--min-p 1.5: needs between 0 and 1"),
    "repetition_penalty": (0.0, "--repetition-penalty 0.0: needs above 0"),
    "stop": ("", "--stop '': the text would end before it begins"),
    "num_beams": (0, "--num-beams 0: needs at least 1"),
    "prompt_lookup": (16, "--prompt-lookup 16: needs 0 to 15"),
    "draft": (" ", "--draft ' ': needs a model's name"),
}


def _help(*command: str) -> str:
    shown = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "100"})
    assert not shown.exit_code
    return re.sub(r"\s+", " ", shown.output)


@pytest.mark.parametrize("name", [one.name for one in fields(Options)])
def test_an_option_is_the_same_wherever_it_is(name: str) -> None:
    field = next(one for one in fields(Options) if one.name == name)
    for function in (load, MoestroConfig):
        assert signature(function).parameters[name].default == field.default
        assert f"{name}: {about(field).help[:40]}" in re.sub(r"\s+", " ", function.__doc__ or "")
    config = MoestroConfig()
    assert getattr(config, name) == getattr(Options(), name) == config.to_dict()[name] == field.default
    assert f"{name}={field.default!r}" in repr(config)
    for command in ("run", "chat"):
        assert about(field).help in _help(command).replace("- ", "-")
        assert flag(name) in _help(command)


def test_every_check_has_a_wrong_value_here() -> None:
    of_source = WRONG_SOURCE | WRONG_OF_LOAD
    for kind, wrong in ((Options, WRONG), (ModelOptions, of_source), (TextOptions, WRONG_TEXT | WRONG_SOURCE)):
        assert {one.name for one in fields(kind) if about(one).check is not None} <= wrong.keys()


@pytest.mark.parametrize("kind", [Options, ModelOptions])
def test_what_was_checked_is_checked_again_and_stays(kind: type[Checked]) -> None:
    """Commands, configs and plans make options anew from those that they were given."""
    checked = [one for one in fields(kind) if about(one).check is not None]
    assert {name_of(one).replace("-", "_") for one in checked} <= {*RIGHT}
    for one in checked:
        for value in RIGHT[name_of(one).replace("-", "_")]:
            first = kind(**{one.name: value})
            again = kind(**{one.name: getattr(first, one.name)})
            assert replace(first) == again == first, (one.name, value)


def in_python(line: str) -> str:
    """What the command line says of a wrong value, as `load` says it: "--bits 5: ..." becomes "bits=5: ..."."""
    return re.sub(r"^--([a-z-]+) ('[^']*'|[^ :]+)", lambda found: f"{found[1].replace('-', '_')}={found[2]}", line)


@pytest.mark.parametrize("name", [*WRONG, *WRONG_SOURCE])
def test_a_wrong_value_gets_one_line_which_names_it_as_it_was_given(name: str, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    value, says = (WRONG | WRONG_SOURCE)[name]
    with pytest.raises(RequestError) as of_load:
        load(**({"model": "demo"} | {name: value}))
    assert str(of_load.value).startswith(in_python(says))
    assert "--" not in str(of_load.value)
    if name in WRONG:
        with pytest.raises(RequestError) as of_config:
            MoestroConfig(**{name: value})
        assert str(of_config.value) == str(of_load.value)
    monkeypatch.setattr(sys, "argv", ["moestro", "run", "demo", flag(name), str(value)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {says}")
    assert printed.count("\n") == 1
    with pytest.raises(RequestError) as again:  # the command line leaves nothing behind
        load(**({"model": "demo"} | {name: value}))
    assert str(again.value) == str(of_load.value)


@pytest.mark.parametrize("name", WRONG_OF_LOAD)
def test_a_wrong_value_of_an_argument_that_only_load_has(name: str) -> None:
    value, says = WRONG_OF_LOAD[name]
    with pytest.raises(RequestError) as error:
        load("demo", **{name: value})
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


KINDS = (Options, ModelOptions, ReplayOptions, TextOptions, ShapeOptions, CellOptions, ComparedOptions, TableOptions)


def _shared_options() -> Iterator[Any]:
    """Each option of each command that has an option's name, with the fields of that name."""
    of_name: dict[str, list[Any]] = {}
    for kind in KINDS:
        for one in fields(kind):
            of_name.setdefault(flag(name_of(one)), []).append(one)
    for names, command in COMMANDS.items():
        for parameter in command.params:
            for name in {*parameter.opts} & of_name.keys():
                yield pytest.param(names, command, parameter, of_name[name], id=" ".join([*names, name]))


@pytest.mark.parametrize(("names", "command", "parameter", "known"), list(_shared_options()))
def test_no_command_has_an_option_of_its_own_under_an_options_name(
    names: list[str],
    command: Any,
    parameter: Any,
    known: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its help is that of a field, its default too unless the command has another, and wrong values get one line."""
    assert any((parameter.help or "").startswith(about(one).help) for one in known)
    assert parameter.metavar in {about(one).metavar for one in known}
    name = next(each for each in parameter.opts if each.startswith("--"))
    if (wrong := (WRONG | WRONG_SOURCE | WRONG_TEXT).get(name[2:].replace("-", "_"))) is None:
        return
    needed = [
        part for one in command.params if one.required for part in (*[o for o in one.opts if o[0] == "-"][:1], "x")
    ]
    monkeypatch.setattr(sys, "argv", ["moestro", *names, *needed, name, str(wrong[0])])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    says = wrong[1].replace("there are 16", "there are 32, 16") if "32" in (parameter.help or "") else wrong[1]
    assert printed.startswith(f"error: {says}")
    assert printed.count("\n") == 1


ODD = (
    None,
    True,
    -1,
    0,
    1,
    8.0,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    b"x",
    [],
    ["lru"],
    [1],
    {},
    {"a": 1},
    Ellipsis,
)


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_of_another_type_is_kept_as_its_type_or_refused_in_one_line(kind: type[Checked], value: Any) -> None:
    hints, refused = get_type_hints(kind), []
    for one in fields(kind):
        try:
            kept = getattr(kind(**{one.name: value}), one.name)
        except RequestError as error:
            refused.append(str(error))
            continue
        if get_origin(hints[one.name]) is Sequence:
            assert isinstance(kept, tuple)
            assert all(isinstance(part, str) for part in kept)
        else:
            assert isinstance(kept, str if one.name == "policy" else hints[one.name])
            assert isinstance(kept, bool) <= (bool in (hints[one.name], *get_args(hints[one.name])))
    names = tuple(f"{name_of(one)}{after}" for one in fields(kind) for after in ("=", " is "))
    assert all(len(line.splitlines()) == 1 and line.startswith(("no ", *names)) for line in refused)


def test_a_config_that_was_saved_makes_an_equal_one() -> None:
    config = MoestroConfig(gpu_memory="12GiB", ram="500MB", link="12GB/s", device="cuda", expert_bits=4, fuse=False)
    kept = json.loads(config.to_json_string())
    assert kept == {"quant_method": "moestro", **config.to_dict()}
    assert (kept["gpu_memory"], kept["ram"], kept["link"]) == (12 * 2**30, 500_000_000, 12.0)
    assert MoestroConfig.from_dict(kept) == config


def test_a_wrong_name_is_one_line() -> None:
    with pytest.raises(MoestroError, match=r"no option 'gpu_mem'; use one of: shape, .*, gpu_memory, ram"):
        load("demo", gpu_mem="12GiB")
    with pytest.raises(MoestroError, match="no option 'gpu_mem'; use one of: gpu_memory, ram"):
        MoestroConfig(gpu_mem="12GiB")


@dataclass(frozen=True, kw_only=True)
class More(Options):
    tempo: int = option(90, "Beats a minute.", metavar="BPM", short="-m", check=needs(lambda n: n > 0, "more than 0"))


def test_a_new_option_is_one_edit() -> None:
    """A field more, and it is in a command, a signature, a docstring and a dict, with its check."""

    @shows_options(More)
    def play(**options: Any) -> dict[str, Any]:
        """Play.

        Args:
            {options}
        """
        check_names(options, [one.name for one in fields(More)])
        return More(**options).to_dict()

    app = typer.Typer()

    @app.command()
    @takes_options(leave_out=("ram",), tempo=120)
    def conduct(options: More) -> None:
        print(options.tempo)

    assert signature(play).parameters["tempo"].default == 90
    assert "tempo: Beats a minute." in (play.__doc__ or "")
    assert play(tempo=60)["tempo"] == 60
    runner = CliRunner()
    assert re.search(r"-m,? ?.*--tempo|--tempo,? ?.*-m", shown := runner.invoke(app, ["--help"]).output)
    assert "Beats a minute." in shown
    assert "--ram" not in shown
    assert runner.invoke(app, []).output == "120\n"
    assert runner.invoke(app, ["-m", "30"]).output == "30\n"
    assert str(runner.invoke(app, ["--tempo", "-4"]).exception) == "tempo=-4: needs more than 0"


def test_replay_has_its_own_defaults() -> None:
    assert ReplayOptions().machine == "rtx4090"
    assert ReplayOptions(bits=32, gpu_memory="1GiB").gpu_bytes == 2**30
    with pytest.raises(RequestError, match="bits=5: there are 32, 16, 8, 4"):
        ReplayOptions(bits=5)


_WITHOUT_TORCH = """
import contextlib, io, json, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "transformers", "numpy", "huggingface_hub"), name
sys.meta_path.insert(0, Refused())
from moestro.cli.main import main
found = []
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["moestro", *arguments]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            found.append((end.code, errors.getvalue()))
print(json.dumps(found))
"""


NOWHERE = ("/nowhere/file.svg", "/nowhere/file.svg cannot be ")
AT_LEAST = ("0", "0 is not in the range")
WRONG_OF_COMMANDS: dict[str, tuple[str, str]] = {  # options that are a command's own
    **dict.fromkeys(("--trace", "--timeline", "--text", "--output"), NOWHERE),
    "--plot": NOWHERE if find_spec("matplotlib") else (NOWHERE[0], "--plot needs matplotlib"),
    **dict.fromkeys(("--tokens", "--prompt-tokens", "--decode-tokens", "--rounds", "--layers"), AT_LEAST),
    **dict.fromkeys(("--answer-tokens", "--requests"), AT_LEAST),
    "--clients": ("1,x", "--clients 1,x: 'x' is no number from 1 on"),
    **dict.fromkeys(("--cached", "--queries", "--window", "--prompt"), AT_LEAST),
    "--size": ("5", "--size 5 has no unit, and would be 5 bytes; did you mean 5GiB?"),
    "--format": ("wishful", "no format 'wishful'; they are named like"),
    "--kv-dtype": ("int3", "no dtype 'int3'; there are: bf16, fp32, fp16"),
    "--batch": ("1,x", "--batch 1,x: 'x' is no number from 1 on"),
    "--beams": ("1", "--beams 1: '1' is no number from 2 on"),
    "--seconds": ("-1", "--seconds -1.0: needs above 0"),
    "--limit-s": ("0", "--limit-s 0.0: needs above 0"),
    "--slots": ("1.5", "--slots 1.5: a share of the experts is wanted"),
}
TAKES_ANY = {"--system"}


def _wrong_ways() -> Iterator[tuple[list[str], str]]:
    """Each option of each command that has a wrong value, given so, and what is said of it."""
    of_fields = {flag(name): (str(value), says) for name, (value, says) in (WRONG | WRONG_SOURCE | WRONG_TEXT).items()}
    of_fields["--as-shape"] = of_fields["--shape"]
    for names, command in (one for one in COMMANDS.items() if one[0][0] in ("run", "chat", "trace", "replay", "bench")):
        text = ["--text", __file__] if any(one.required and "--text" in one.opts for one in command.params) else []
        arguments = [one.name for one in command.params if one.param_type_name == "argument"]
        given = [{"model": "demo", "prompt": "x", "trace": __file__}[name] for name in arguments]
        for parameter in command.params:
            option = next((each for each in parameter.opts if each.startswith("--")), None)
            if option is None or parameter.type.name == "boolean" or option in TAKES_ANY:
                continue
            value, says = (of_fields | WRONG_OF_COMMANDS)[option]
            if names[-1] == "decode" and option == "--cached":
                says = "--cached is about the steps of --batch; give that too"
            if getattr(parameter.type, "min", None) == 0:
                value, says = "-1", "-1 is not in the range"
            if "32" in (parameter.help or ""):
                says = says.replace("there are 16", "there are 32, 16")
            model = [] if option == "--trace" and names[0] == "bench" else given  # which would come in its place
            yield [*names, *model, *([] if option == "--text" else text), option, value], says


def test_every_option_with_a_wrong_value_answers_without_torch() -> None:
    ways = list(_wrong_ways())
    assert len(ways) > 150
    ways += [
        (["run"], "name one model"),
        (["chat"], "name one model"),
        (["bench", "recall"], "name one model"),
        (["bench", "policies"], "name one model"),
        (["run", "demo", "x", "--bits", "five"], "Invalid value for '--bits': 'five' is not a valid int"),
        (["run", "demo", "x", "--wishful"], "No such option: --wishful"),
        (["wishful"], "No such command 'wishful'"),
        (["run", "demo", "x", "--clock", "virtual"], "--clock virtual needs --device emulated"),
        (["run", "demo", "x", "--no-pack-dense", "--dense-bits", "8"], "are for packed layers"),
    ]
    given = json.dumps([arguments for arguments, _ in ways])
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH], input=given, capture_output=True, text=True, check=True
    )
    for (arguments, says), (code, printed) in zip(ways, json.loads(done.stdout), strict=True):
        assert code == 2, (arguments, printed)
        assert printed.startswith("error: ")
        assert says in printed, (arguments, printed)
        assert printed.count("\n") == 1
