"""Sockets, TLS files and the uvicorn server of whatever listens: a Server, or the Router in front of several."""

import argparse
import socket
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aurora.config import LimitsConfig, UserError

if TYPE_CHECKING:
    import uvicorn

_CLOSE_S = 5  # connections may stay that long after the last request was answered
_TLS = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")  # vLLM's flags and uvicorn's


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening-ready TCP socket. Raises UserError when the address cannot be had.

    shared: another process of this user may listen there, too, if it allows it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from error
    return sock


def url_of(sock: socket.socket, *, tls: bool) -> str:
    """Where the server on a bound socket answers."""
    host, port = sock.getsockname()[:2]
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def http_server(app: Any, limits: LimitsConfig, tls: dict[str, Any]) -> "uvicorn.Server":
    """A uvicorn server, ready for `await server.serve(sockets=[sock])`. Raises UserError for unusable TLS files."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        http="h11",  # the other parser of uvicorn's bounds no headers
        log_level="warning",
        access_log=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_CLOSE_S,
        h11_max_incomplete_event_size=limits.header_kib << 10,
        **tls,
    )
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"--ssl-keyfile, --ssl-certfile: {error}; give a key and a certificate that fit") from error
    return uvicorn.Server(settings)


def tls_of(args: Namespace) -> dict[str, Any]:
    """uvicorn's settings from vLLM's arguments; none without a certificate. Raises UserError for half of a pair."""
    if bool(args.ssl_keyfile) != bool(args.ssl_certfile):
        raise UserError("--ssl-keyfile and --ssl-certfile belong together: give both, or neither")
    return {name: getattr(args, name) for name in _TLS if getattr(args, name) is not None} if args.ssl_keyfile else {}


def split_tls(flags: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """uvicorn's settings from those of vLLM's flags that are of TLS, and the other flags. Raises UserError."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for name in _TLS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if name == "ssl_cert_reqs" else str)
    try:
        found, others = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; give each TLS flag its value") from error
    return tls_of(found), tuple(others)
