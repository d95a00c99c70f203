"""What docs/serve.md has of Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moestro.serve.service import Service
from serving import loaded, serving

TEXT = (Path(__file__).parent.parent / "docs" / "serve.md").read_text()
PIECES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_both_packages_are_there() -> None:
    assert [piece.splitlines()[0] for piece in PIECES] == ["import openai", "import anthropic"]


@pytest.mark.parametrize("at", range(len(PIECES)))
def test_pieces(at: int, capsys: pytest.CaptureFixture[str]) -> None:
    made = loaded()
    with serving(Service("demo", lambda: made)) as address:
        exec(PIECES[at].replace("http://127.0.0.1:8080", address), {})
    assert capsys.readouterr().out.strip()
