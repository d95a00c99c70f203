"""The page at /, and the files that it consists of: they are read once, and no request names a path."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

from .faults import Refused
from .guard import OPEN_FOLDER

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_INDEX = "index.html"
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """/ and what is in /page/."""
    routes = APIRouter(include_in_schema=False)
    found = {each.name: each for each in files(__package__).joinpath("page").iterdir()}
    kept = {name: (each.read_bytes(), _TYPES[name.rpartition(".")[2]]) for name, each in found.items()}

    def answer(name: str) -> Response:
        if name not in kept:
            raise Refused(404, f"the page has no file {name!r}")
        content, kind = kept[name]
        return Response(content, media_type=kind, headers=_HEADERS)

    @routes.get("/", response_model=None)
    async def index() -> Response:
        """The page."""
        return answer(_INDEX)

    @routes.get(OPEN_FOLDER + "{name}", response_model=None)
    async def asset(name: str) -> Response:
        """A file of the page."""
        return answer(name)

    return routes
