"""vLLM's own OpenAI application on a uvicorn server inside the actor's event loop."""

import socket
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aurora.config import AuroraConfig
from serve import dead_ends, page, request_options, source_answers
from serve.access import AccessMiddleware, open_paths
from serve.admission import Admission, AdmissionMiddleware
from serve.answers import AnswerCounter
from serve.asgi import error_body
from serve.engine import RunningEngine
from serve.history import History
from serve.listen import http_server, tls_of
from serve.token_sources import SourceBook

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response


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
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args = engine.args
    args.api_key = None  # `guard` asks for it, on every route
    args.host, args.port = config.server.host, sock.getsockname()[1]
    tasks = await engine.client.get_supported_tasks()
    app = build_app(args, tasks, engine.client.model_config)
    guard(app, config, keys, admission, history)
    dead_ends.install(engine.client)
    source_answers.install(app, SourceBook(speculates=engine.drafter is not None), engine.client)
    await init_app_state(engine.client, app.state, args, tasks)
    return http_server(app, config.limits, tls_of(args))


def guard(app: "FastAPI", config: AuroraConfig, keys: Sequence[str], admission: Admission, history: History) -> None:
    """Put what is Aurora's into vLLM's application, which does not serve yet.

    From the outside in: answers are counted, who may ask, how much is taken on, vLLM's own middlewares, what a request
    asks of speculation.
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
    app.user_middleware.insert(0, Middleware(AnswerCounter, told=admission.on_answer))


async def _in_openai_form(_request: "Request", error: Exception) -> "Response":
    """What the framework refuses by itself: unknown routes, wrong methods, bodies that its parser gives up on."""
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

    assert isinstance(error, HTTPException)
    body = error_body(HTTPStatus(error.status_code), error.detail)
    return Response(body, error.status_code, error.headers, media_type="application/json")
