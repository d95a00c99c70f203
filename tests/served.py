"""Fixtures of a server of the demo model with a chat template, and of its clients; a plugin of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # which other tests need not wait for
    import anthropic
    import openai

    from moestro.serve.service import Service


@pytest.fixture(scope="module")
def service() -> Service:
    """The demo model under its name; its chat template knows tools and thinking."""
    from moestro.serve.service import Service
    from serving import TEMPLATE, loaded

    made = loaded(template=TEMPLATE)
    return Service("demo", lambda: made)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    """Where the server listens, as a URL."""
    from serving import serving

    with serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(address: str) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own."""
    import anthropic

    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def engine(service: Service) -> Iterator[Any]:
    """The server's engine, whose `script` a test may set."""
    from serving import ScriptedEngine

    engine = service.engine
    assert isinstance(engine, ScriptedEngine)
    yield engine
    engine.script = ""
