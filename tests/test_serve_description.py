"""/openapi.json is true: each request made from it gets a status, a type and a body that it describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from moestro.serve.app import make_app
from moestro.serve.service import Loaded, Service
from serving import loaded, serving

OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
]
STREAM = "/live"  # has no end


@pytest.fixture(scope="module")
def made() -> Loaded:
    return loaded(context=64)


@pytest.fixture(scope="module")
def address(made: Loaded) -> Iterator[str]:
    with serving(Service("demo", lambda: made)) as at:
        yield at


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    found: dict[str, Any] = make_app(Service("demo", loaded)).openapi()
    return found


def test_each_operation_is_here(description: dict[str, Any]) -> None:
    found = [(method.upper(), path) for path, methods in description["paths"].items() for method in methods]
    assert sorted(found) == sorted([*OPERATIONS, ("GET", STREAM)])


def test_each_answer_and_each_refusal_is_described(description: dict[str, Any]) -> None:
    text = json.dumps(description)
    assert "422" not in text, "what FastAPI would answer, but this server does not"
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            codes = {*operation["responses"]}
            assert "200" in codes
            assert {"400", "401", "403"} <= codes
            if method == "post":
                assert {"408", "413", "415", "429", "503"} <= codes
            for code in codes - {"200"}:
                if path == "/health" and code == "503":
                    continue
                schema = operation["responses"][code]["content"]["application/json"]["schema"]["$ref"]
                assert schema.endswith("AnthropicError" if path.startswith("/v1/messages") else "OpenAIError")


def _check(address: str, description: dict[str, Any], method: str, path: str, examples: int, seed: int) -> None:
    schema = schemathesis.openapi.from_dict(description)
    operation = schema[path][method]

    def one(case: schemathesis.Case) -> None:
        answer = case.call(base_url=address, timeout=60)
        # What the description allows may still be too long, or a value that is not supported: that is a 400.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    from hypothesis import given
    from hypothesis import seed as seeded

    checks = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    modes = [schemathesis.GenerationMode.POSITIVE]
    if method == "POST":  # the others have nothing that could be wrong
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:
        strategy = operation.as_strategy(generation_mode=mode)
        checks(seeded(seed)(given(case=strategy)(one)))()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_requests_made_from_it(
    address: str, description: dict[str, Any], method: str, path: str, request: pytest.FixtureRequest
) -> None:
    _check(address, description, method, path, 25, request.config.getoption("--seed"))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_many_requests_made_from_it(
    address: str, description: dict[str, Any], method: str, path: str, request: pytest.FixtureRequest
) -> None:
    _check(address, description, method, path, 1000, request.config.getoption("--seed"))


def test_it_is_the_one_that_is_served(address: str, description: dict[str, Any]) -> None:
    assert httpx2.get(f"{address}/openapi.json").json() == description
