"""A machine as a file, which `moestro machine -o FILE` writes and `--machine FILE` reads; docs/plan.md has its numbers.

    >>> parse_machine('{"name": "box", "ram_bytes": 68719476736, "cpu_gbps": 40, "cpu_gflops": 900}').costs.cpu_gbps
    40.0

A few numbers are enough; those that are left out are taken from others, as for a machine that is known by its class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .machines import Machine, costs_of, machine_named, machine_names, no_machine
from .option import Check
from .rates import Curve, Rates, assumed_rates, curves_of, filled_up, table_of

SCHEMA = 1
_NEEDED = ("ram_bytes", "cpu_gbps", "cpu_gflops")
_OF_GPU = ("gpu_gbps", "gpu_gflops", "link_gbps")
_COSTS = ("cpu_gbps", "cpu_gflops", "cpu_beside_link_gbps", "link_gbps", "gpu_gbps", "gpu_gflops", "disk_gbps")
_TABLES = {"experts_gbps": "experts", "wide_experts_gbps": "wide_experts", "dense_gbps": "dense"}
_WIDE = "wide_experts_gbps"  # which may be left out, in whole or in part
_RATES = tuple(one.name for one in fields(Rates) if one.name not in _TABLES.values())
_NUMBERS = (*_COSTS, "ram_bytes", "gpu_bytes", *_RATES)
_TEXTS = ("name", "text")
_BESIDE = ("schema", "versions", "kernel_level", "model_revision", "options")  # which `--json` prints too
_ENDING = ".json"


def machine_values(machine: Machine) -> dict[str, Any]:
    """A machine as its file has it; numbers with five digits."""
    values: dict[str, Any] = {"schema": SCHEMA, "name": machine.name, "text": machine.text}
    numbers: dict[str, Any] = {"ram_bytes": machine.ram_bytes, "gpu_bytes": machine.gpu_bytes}
    costs = asdict(machine.costs)
    numbers |= {name: costs[name] for name in _COSTS}
    if machine.rates is not None:
        numbers |= {name: getattr(machine.rates, name) for name in _RATES}
    if not machine.gpu_bytes:
        numbers["gpu_bytes"] = numbers["cpu_beside_link_gbps"] = None
    values |= {name: _rounded(value) for name, value in numbers.items() if value is not None}
    if machine.rates is not None:
        for name, field in _TABLES.items():
            table = table_of(getattr(machine.rates, field))
            values[name] = {
                fmt: {tokens: _rounded(gbps) for tokens, gbps in points.items()} for fmt, points in table.items()
            }
    return values


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


def read_machine(path: Path) -> Machine:
    """The machine of a file.

    Raises:
        RequestError: it cannot be read, or is none; one line.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RequestError(f"the machine {path} cannot be read: {why}") from error
    try:
        return parse_machine(text)
    except RequestError as error:
        raise RequestError(f"{path} is no machine: {error}; moestro machine -o FILE writes one") from None


def parse_machine(text: str) -> Machine:
    """The machine that a file's text describes.

    Raises:
        RequestError: what is missing or wrong in it.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RequestError(f"it is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise RequestError("it is no JSON object")
    if unknown := sorted(values.keys() - {*_NUMBERS, *_TEXTS, *_TABLES, *_BESIDE}):
        raise RequestError(f"it has {unknown[0]!r}, which nothing reads; there are {', '.join((*_NUMBERS, *_TABLES))}")
    if values.get("schema", SCHEMA) != SCHEMA:
        raise RequestError(f"its schema is {values['schema']!r}, but {SCHEMA} is known here")
    numbers = {name: _number(name, values[name]) for name in _NUMBERS if values.get(name) is not None}
    texts = {name: values.get(name, "a machine of a file") for name in _TEXTS}
    if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise RequestError(f"{wrong[0]} is {texts[wrong[0]]!r}, but a text is needed")
    needed = (*_NEEDED, *(_OF_GPU if "gpu_bytes" in numbers else ()))
    if missing := [name for name in needed if name not in numbers]:
        raise RequestError(f"it lacks {missing[0]}; {', '.join(needed)} are needed")
    has_gpu = "gpu_bytes" in numbers
    rates: dict[str, Any] = {name: numbers[name] for name in _COSTS if name in numbers}
    if not has_gpu:
        rates = {name: value for name, value in rates.items() if name not in (*_OF_GPU, "cpu_beside_link_gbps")}
    return Machine(
        name=texts["name"],
        text=texts["text"],
        gpu_bytes=int(numbers.get("gpu_bytes", 0)),
        ram_bytes=int(numbers["ram_bytes"]),
        costs=costs_of(**rates),
        rates=_rates(values, numbers),
    )


def _rates(values: Mapping[str, Any], numbers: Mapping[str, float]) -> Rates | None:
    """What the file says of the CPU's kernels, filled up; None where it lacks their tables."""
    if any(name not in values for name in _TABLES if name != _WIDE):
        return None
    tables: dict[str, tuple[Curve, ...]] = {"wide_experts": ()}
    for name, field in _TABLES.items():
        if name == _WIDE and values.get(name) is None:
            continue
        try:
            tables[field] = curves_of(values[name])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise RequestError(
                f'{name} needs formats with tokens and GB/s, like {{"int8": {{"1": 20.5}}}} ({error})'
            ) from None
    assumed = asdict(assumed_rates(numbers["cpu_gbps"], numbers["cpu_gflops"]))
    own = {name: numbers[name] for name in _RATES if name in numbers}
    tables["wide_experts"] = filled_up(tables["experts"], tables["wide_experts"])
    return Rates(**{**{name: assumed[name] for name in _RATES}, **own, **tables})


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise RequestError(f"{name} is {value!r}, but a number above 0 is needed")
    return float(value)


def machine_of(given: str) -> Machine:
    """The machine of that name, or of a file.

    Raises:
        RequestError: there is none; one line with those there are.
    """
    return read_machine(Path(given).expanduser()) if _is_file(given) else machine_named(given)


def _is_file(given: str) -> bool:
    return given not in machine_names() and (given.endswith(_ENDING) or Path(given).expanduser().is_file())


def check_machine() -> Check:
    """A check that an option names a machine, or a file that has one; a file is read once here, and again later."""

    def check(value: Any, flag: str) -> Any:
        if value not in machine_names():
            if not _is_file(value):
                raise RequestError(no_machine(value))
            machine_of(value)
        return value

    return check
