"""Random schemas and random sampling values: each answer that ended by itself follows its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from time import sleep
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.serve.constraints import following
from moestro.serve.requests import Request, Sampling
from moestro.serve.service import Ready, Service
from serving import loaded

SAMPLED = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([0.01, 0.5, 1.0]),
        "min_p": st.sampled_from([0.0, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 50.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
        "logit_bias": st.dictionaries(st.integers(0, 300), st.sampled_from([-100.0, 100.0]), max_size=5),
        "seed": st.integers(0, 2**31),
    }
)
LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 120},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": ["boolean", "null"]},
        {"enum": ["é", 2, None, [1]]},
        {"const": {"a": "</think>"}},
    ]
)


def _larger(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.dictionaries(st.sampled_from(["a", "b c", "日本"]), schemas, max_size=2)
    return st.one_of(
        names.map(lambda one: {"type": "object", "properties": one, "additionalProperties": False}),
        names.map(lambda one: {"type": "object", "properties": one, "required": [*one], "additionalProperties": False}),
        schemas.map(lambda one: {"type": "array", "items": one, "maxItems": 2}),
        st.lists(schemas, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    )


@pytest.fixture(scope="module")
def demo() -> Iterator[Ready]:
    service = Service("demo", loaded)
    service.start()
    while service.state == "loading":
        sleep(0.01)
    yield service.ready()
    service.close(finish=False)


@settings(max_examples=200, deadline=None)
@given(schema=st.recursive(LEAVES, _larger, max_leaves=4), sampled=SAMPLED)
def test_each_answer_that_ends_follows_its_schema(demo: Ready, schema: dict[str, Any], sampled: dict[str, Any]) -> None:
    prompt = demo.tokenizer("Once upon a time").input_ids
    (constraint,) = following(demo, 1, prompt, schema=schema)
    request = Request(prompt=prompt, sampling=Sampling(**sampled), max_new_tokens=60, constraint=constraint)
    *pieces, end = demo.engine.submit(request)
    assert end.reason in ("stop", "length"), end
    if end.reason == "stop":
        text = "".join(piece.text for piece in pieces)
        jsonschema_rs.validate(schema, json.loads(text))
