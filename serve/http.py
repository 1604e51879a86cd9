"""vLLM's own OpenAI application on a uvicorn server inside the actor's event loop."""

import socket
from pathlib import Path

from aurora.config import AuroraConfig, UserError
from serve import request_options
from serve.engine import RunningEngine

_DRAIN_S = 30  # open requests may take this long after a stop


def bind(host: str, port: int) -> socket.socket:
    """A listening-ready TCP socket. Raises UserError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from error
    return sock


def read_api_keys(file: Path | None, environment_key: str | None) -> list[str]:
    """API keys from a file (one a line) and the environment. Raises UserError for an unreadable or empty file."""
    keys = [environment_key] if environment_key else []
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise UserError(
                f"--api-key-file {file}: {error.strerror}; give a readable file with one key a line"
            ) from error
        if not keys:
            raise UserError(f"--api-key-file {file}: holds no key; put one key on each line")
    return keys


async def serve_http(engine: RunningEngine, config: AuroraConfig, sock: socket.socket, keys: list[str]) -> "object":
    """Build the application and return the uvicorn server, ready for `await server.serve(sockets=[sock])`."""
    import uvicorn
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args = engine.args
    args.api_key = keys or None
    args.host, args.port = config.server.host, sock.getsockname()[1]
    tasks = await engine.client.get_supported_tasks()
    app = build_app(args, tasks, engine.client.model_config)
    request_options.install(app)
    await init_app_state(engine.client, app.state, args, tasks)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_DRAIN_S,
        h11_max_incomplete_event_size=4 << 20,
    )
    return uvicorn.Server(settings)
