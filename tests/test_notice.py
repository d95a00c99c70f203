"""NOTICE names what an installation brings with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_dependency_is_in_the_notice() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    needed += [one for name, group in extras.items() if name != "dev" for one in group]
    names = {re.match(r"[\w.-]+", one)[0] for one in needed}  # type: ignore[index]
    notice = (ROOT / "NOTICE").read_text()
    assert not [name for name in names if not re.search(rf"^ +{re.escape(name)} ", notice, re.MULTILINE)]
