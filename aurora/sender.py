"""Sends chat requests and times their answers."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aurora.prompts import Conversation

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_ERROR_CHARS = 300


@dataclass(frozen=True)
class Record:
    """One request. `error` is None if it was answered to its end."""

    latency_s: float
    ttft_s: float | None = None  # None if no text came
    completion_tokens: int = 0
    error: str | None = None
    prompt_tokens: int = 0
    started_s: float = 0.0  # by the monotonic clock


class Sender:
    """Sends single requests and whole conversations; what goes wrong with one is in its record, never raised."""

    def __init__(
        self, client: "AsyncOpenAI", fields: Mapping[str, Any], timeout_s: float, send_domain: bool = False
    ) -> None:
        """fields: model and sampling parameters of every request. timeout_s: from sending to the end of the answer.

        send_domain: label requests with their conversation's domain, in `metadata`.
        """
        self.client = client
        self._send_domain = send_domain
        self._fields = dict(fields)
        self._timeout_s = timeout_s

    async def converse(self, conversation: Conversation, records: list[Record]) -> None:
        """Send the turns one after the other with all that was said before; append each one's record to `records`."""
        messages: list[dict[str, str]] = []
        for turn in conversation.turns:
            messages.append({"role": "user", "content": turn})
            record, answer = await self.request(messages, conversation.domain if self._send_domain else "")
            records.append(record)
            if record.error is not None:
                return
            messages.append({"role": "assistant", "content": answer})

    async def request(self, messages: list[dict[str, str]], domain: str = "") -> tuple[Record, str]:
        """One streamed chat request: its record and the text of the answer."""
        import openai

        start = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._stream(messages, domain, start)
        except TimeoutError:
            error = f"no complete answer within --timeout {self._timeout_s:g} s"
        except (openai.OpenAIError, ValueError) as problem:
            error = one_line(problem)
        return Record(time.monotonic() - start, error=error, started_s=start), ""

    async def _stream(self, messages: list[dict[str, str]], domain: str, start: float) -> tuple[Record, str]:
        label = {"metadata": {"domain": domain}} if domain else {}
        stream: Any = await self.client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **self._fields, **label
        )  # type: ignore[call-overload]
        answer: list[str] = []
        first, tokens, prompt, finished = None, 0, 0, False
        async for chunk in stream:
            for choice in chunk.choices:
                finished = finished or choice.finish_reason is not None
                if choice.delta.content:
                    first = first or time.monotonic() - start
                    answer.append(choice.delta.content)
            if chunk.usage:
                tokens, prompt = chunk.usage.completion_tokens, chunk.usage.prompt_tokens
        error = None if finished else "the stream ended before the answer was complete"
        return Record(time.monotonic() - start, first, tokens, error, prompt, start), "".join(answer)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, cut to a readable length; its type's name if it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:_ERROR_CHARS]
