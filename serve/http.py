"""vLLM's own OpenAI application on a uvicorn server inside the actor's event loop."""

import socket
from argparse import Namespace
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aurora.config import AuroraConfig, UserError
from serve import page, request_options, source_answers
from serve.access import AccessMiddleware, open_paths
from serve.admission import Admission, AdmissionMiddleware
from serve.asgi import error_body
from serve.engine import RunningEngine
from serve.history import History
from serve.token_sources import SourceBook

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

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


def url_of(sock: socket.socket, args: Namespace) -> str:
    """Where the server on a bound socket answers; args: vLLM's, with the TLS files."""
    host, port = sock.getsockname()[:2]
    return f"http{'s' if args.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"


async def serve_http(
    engine: RunningEngine,
    config: AuroraConfig,
    sock: socket.socket,
    keys: Sequence[str],
    admission: Admission,
    *,
    history: History,
) -> Any:
    """Build the application and return the uvicorn server, ready for `await server.serve(sockets=[sock])`.

    Raises UserError for TLS files that cannot be used.
    """
    import uvicorn
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args = engine.args
    args.api_key = None  # `guard` asks for it, on every route
    args.host, args.port = config.server.host, sock.getsockname()[1]
    tasks = await engine.client.get_supported_tasks()
    app = build_app(args, tasks, engine.client.model_config)
    guard(app, config, keys, admission, history)
    source_answers.install(app, SourceBook(speculates=engine.drafter is not None), engine.client)
    await init_app_state(engine.client, app.state, args, tasks)
    settings = uvicorn.Config(
        app,
        http="h11",  # the other parser of uvicorn's bounds no headers
        log_level="warning",
        access_log=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_CLOSE_S,
        h11_max_incomplete_event_size=config.limits.header_kib << 10,
        **_tls(args),
    )
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"--ssl-keyfile, --ssl-certfile: {error}; give a key and a certificate that fit") from error
    return uvicorn.Server(settings)


def guard(app: "FastAPI", config: AuroraConfig, keys: Sequence[str], admission: Admission, history: History) -> None:
    """Put what is Aurora's into vLLM's application, which does not serve yet.

    From the outside in: who may ask, how much is taken on, vLLM's own middlewares, what a request asks of speculation.
    """
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware

    async def ready(_request: "Request") -> "Response":
        from starlette.responses import Response

        return Response(status_code=503 if admission.draining else 200)

    app.add_route("/ready", ready, methods=["GET"])
    page.install(app, history)
    app.add_exception_handler(HTTPException, _in_openai_form)
    request_options.install(app)
    app.user_middleware.insert(0, Middleware(AdmissionMiddleware, admission=admission, limits=config.limits))
    if keys:
        paths = open_paths(config.server)
        app.user_middleware.insert(0, Middleware(AccessMiddleware, keys=keys, open_paths=paths))


async def _in_openai_form(_request: "Request", error: Exception) -> "Response":
    """What the framework refuses by itself: unknown routes, wrong methods, bodies that its parser gives up on."""
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

    assert isinstance(error, HTTPException)
    body = error_body(HTTPStatus(error.status_code), error.detail)
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _tls(args: Namespace) -> dict[str, Any]:
    """uvicorn's settings from vLLM's flags; none without a certificate. Raises UserError for half of a pair."""
    if bool(args.ssl_keyfile) != bool(args.ssl_certfile):
        raise UserError("--ssl-keyfile and --ssl-certfile belong together: give both, or neither")
    return {name: getattr(args, name) for name in _TLS if getattr(args, name) is not None} if args.ssl_keyfile else {}
