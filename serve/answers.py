"""Counts HTTP answers by their status, those of Aurora's own middlewares included: the outermost of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FAILED = 500


class AnswerCounter:
    """Tells of the status of each answer; of 500 when the application fails without one."""

    def __init__(self, app: "ASGIApp", told: Callable[[int], None]) -> None:
        self._app = app
        self._told = told

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        async def watch(message: "Message") -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self._told(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            if not answered:
                self._told(_FAILED)
            raise
