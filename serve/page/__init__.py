"""The web page beside the API: `/aurora`, the files that it is made of, and its data at `/aurora/data`.

The files hold nothing of this server and are open, so that a browser can show them and ask for the key; the data is as
open as the metrics are (`serve.access`). No file comes from elsewhere, and browsers are told to load none.
"""

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from serve.access import PAGE_DATA_PATH, PAGE_PATH, PAGE_PATHS
from serve.history import Hour

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    Handler = Callable[[Request], Awaitable[Response]]

_FOLDER = Path(__file__).parent
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


DATA_HEADERS = {**_HEADERS, "content-type": "application/json", "cache-control": "no-store"}


class Source(Protocol):
    """Where the page's data come from: `serve.history.History` of a server."""

    async def look(self) -> None: ...

    def since(self, time_s: float) -> Hour: ...


def install(app: "Starlette", history: Source) -> None:
    """Add the page's routes to an application that does not serve yet."""
    for path in sorted(PAGE_PATHS):
        app.add_route(path, _file(path), methods=["GET"])
    app.add_route(PAGE_DATA_PATH, _data(history), methods=["GET"])


def _file(path: str) -> "Handler":
    name = "index.html" if path == PAGE_PATH else path.rpartition("/")[2]
    file = _FOLDER / name
    content, kind = file.read_bytes(), f"{_KINDS[file.suffix]}; charset=utf-8"

    async def answer(_request: "Request") -> "Response":
        from starlette.responses import Response

        return Response(content, headers={**_HEADERS, "content-type": kind, "cache-control": "no-cache"})

    return answer


def _data(history: Source) -> "Handler":
    async def answer(request: "Request") -> "Response":
        from starlette.responses import Response

        await history.look()
        data = history.since(seconds(request.query_params.get("since", "")))
        return Response(msgspec.json.encode(data), headers=DATA_HEADERS)

    return answer


def seconds(text: str) -> float:
    """A time as the page says it; the beginning for what is none."""
    try:
        time_s = float(text)
    except ValueError:
        return 0.0
    return time_s if math.isfinite(time_s) else 0.0
