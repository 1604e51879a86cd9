"""Who may ask what: one middleware in front of every route, and a server that nobody guards stays on this machine."""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from aurora.config import ServerConfig, UserError
from serve.asgi import header, path_of, send_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PAGE_PATH, PAGE_DATA_PATH = "/aurora", "/aurora/data"
_PAGE_FILES = ("api.js", "charts.js", "page.css", "page.js", "playground.js", "views.js")
PAGE_PATHS = frozenset({PAGE_PATH, *(f"{PAGE_PATH}/{name}" for name in _PAGE_FILES)})  # the same on every server
OPEN_PATHS = frozenset({"/health", "/ready", "/ping"}) | PAGE_PATHS  # say whether the server is well, and no more
METRICS_PATH = "/metrics"
_KEY_VARIABLES = ("AURORA_API_KEY", "VLLM_API_KEY")
_FORBIDDEN = "no valid API key: send one as 'Authorization: Bearer KEY' (or 'x-api-key: KEY')"


class AccessMiddleware:
    """Lets a request through that carries one of the keys or asks for an open path; all others get status 401.

    It knows no routes: one that is added later is guarded, too. A browser that asks for leave (CORS) sends no key.
    """

    def __init__(self, app: "ASGIApp", keys: Sequence[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = open_paths

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] not in ("http", "websocket") or self._may(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: status 403
        else:
            await send_error(send, HTTPStatus.UNAUTHORIZED, _FORBIDDEN, headers=[(b"www-authenticate", b"Bearer")])

    def _may(self, scope: "Scope") -> bool:
        return _is_preflight(scope) or path_of(scope) in self._open or self._has_key(scope)

    def _has_key(self, scope: "Scope") -> bool:
        scheme, _, key = header(scope, b"authorization").partition(b" ")
        given = _digest(key if scheme.lower() == b"bearer" else header(scope, b"x-api-key"))
        found = False
        for digest in self._digests:  # all of them, so that the time says nothing of which one it was
            found |= hmac.compare_digest(given, digest)
        return found


def _is_preflight(scope: "Scope") -> bool:
    """Whether a browser asks for leave: the CORS middleware answers that itself, no route sees it."""
    names = {name for name, _ in scope["headers"]}
    return scope.get("method") == "OPTIONS" and {b"origin", b"access-control-request-method"} <= names


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def open_paths(server: ServerConfig) -> frozenset[str]:
    """What is served without a key; metrics and the page's data only where nobody but this machine hears them."""
    return OPEN_PATHS | {METRICS_PATH, PAGE_DATA_PATH} if is_loopback(server.host) else OPEN_PATHS


def read_api_keys(file: Path | None, environment: Mapping[str, str]) -> list[str]:
    """API keys from a file (one a line) and the environment. Raises UserError for an unreadable or empty file."""
    keys = [environment[name] for name in _KEY_VARIABLES if environment.get(name)]
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no text"
            raise UserError(f"--api-key-file {file}: {reason}; give a readable file with one key a line") from error
        if not keys:
            raise UserError(f"--api-key-file {file}: holds no key; put one key on each line")
    return keys


def refuse_exposure(server: ServerConfig, keys: Sequence[str]) -> None:
    """Raise UserError for a server that everybody in reach of its address could use."""
    if not keys and not server.insecure and not is_loopback(server.host):
        raise UserError(
            f"--host {server.host}: reachable from other machines, and no API key guards it; set AURORA_API_KEY or "
            "give --api-key-file FILE, listen on 127.0.0.1, or say --insecure if something else guards it"
        )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is heard on this machine only. A name counts only if it is localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
