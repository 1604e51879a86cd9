"""Stands in for a server that is started anew: whoever asks is told to come back, instead of finding nobody there."""

import logging
import socket
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 10
_CLIENT_S = 5.0  # that a client may take to ask
_BODY = b'{"error": {"message": "the server restarts; ask again", "type": "ServiceUnavailableError", "code": 503}}'


class Standby:
    """Answers every request to a URL with 503 until it is closed; does nothing where it cannot listen, or with TLS."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server: ThreadingHTTPServer | None = None
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            return
        with suppress(OSError):
            self._server = _Server((parts.hostname, parts.port), _Handler)
            Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Leave the address to the server. May be called again."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = True  # as the restarted server does, which binds while this one still answers

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_S

    def __getattr__(self, name: str) -> object:
        """`do_GET` and whatever else is asked."""
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        self.send_response(503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(_BODY)))
        self.send_header("Retry-After", str(_RETRY_AFTER_S))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(_BODY)

    def log_message(self, *args: object) -> None:
        log.debug("asked while the server restarts: %s", args[1:])
