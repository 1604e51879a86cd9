"""`aurora traffic`: sends a data set to an OpenAI-compatible endpoint and measures what comes back.

Without `rate`, `concurrency` conversations are open at any time (closed loop). With it, conversations start at Poisson
arrival times, however many are open (open loop). The turns of a conversation follow one another; a failed turn ends it.
"""

import asyncio
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from aurora.arrivals import write_arrivals
from aurora.config import UserError, require_positive, require_writable
from aurora.endpoint import check_url, read_client_key
from aurora.prompts import Conversation, read_prompts
from aurora.scrape import Scrape, parse_scrape
from aurora.sender import Record, Sender, one_line
from aurora.traffic_result import boundaries, show, summarise, write_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_CANCEL_AGAIN_S = 1.0
_START_TIMEOUT_S = 15.0  # for the first answer of the server and for each scrape


@dataclass(frozen=True)
class TrafficOptions:
    """What to send, where to and how fast. Raises UserError for a value that cannot be used."""

    dataset: str  # JSONL file, or what `datasets.load_dataset` takes
    url: str = "http://127.0.0.1:8000"
    split: str = "train"
    variant: str | None = None
    domain: str | None = None
    limit: int | None = None  # conversations
    concurrency: int = 4  # open conversations; counts only without `rate`
    rate: float | None = None  # conversations started a second
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    model: str | None = None  # None: the first that the server lists
    api_key_file: Path | None = None  # None: AURORA_API_KEY
    json_file: Path | None = None
    trace: Path | None = None  # file for the arrivals
    seed: int = 0  # of the arrival times
    send_domain: bool = False  # label each request with its row's domain
    timeout: float = 600.0  # seconds a request may take

    def __post_init__(self) -> None:
        require_positive(self, "limit", "concurrency", "rate", "max_tokens", "timeout")
        if not 0 <= self.temperature <= 2:
            raise UserError(f"--temperature {self.temperature}: must be between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        check_url(self.url)
        require_writable("--json", self.json_file)
        require_writable("--trace", self.trace)

    @property
    def root(self) -> str:
        """The server's URL without `/v1`."""
        return check_url(self.url)

    def key(self) -> str:
        """The API key to send. Raises UserError if the file given cannot be read or is empty."""
        return read_client_key(self.api_key_file)


def run(options: TrafficOptions) -> int:
    """Send the traffic and report it; 0 if no request failed, 1 if one did, 130 if interrupted.

    Raises UserError, before anything is sent or written, for a data set that cannot be read and for a server that does
    not answer or does not serve the model.
    """
    from rich.console import Console

    prompts = read_prompts(
        options.dataset, split=options.split, variant=options.variant, domain=options.domain, limit=options.limit
    )
    traffic = Traffic(options, prompts)
    try:
        asyncio.run(_until_interrupted(traffic.send()))
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    result = summarise(traffic.records, traffic.scrapes, traffic.duration_s, interrupted)
    show(result, Console())
    if traffic.metrics_error is not None:
        print(f"acceptance unknown: {traffic.metrics_error}", file=sys.stderr)
    if options.json_file is not None and traffic.started:
        write_json(result, options.json_file)
    if options.trace is not None and traffic.started:
        done = sorted((r.started_s, r.prompt_tokens, r.completion_tokens) for r in traffic.records if r.error is None)
        write_arrivals(done, options.trace)
    return 130 if interrupted else int(result.failures > 0)


async def _until_interrupted(work: Coroutine[None, None, None]) -> None:
    """Run `work`; on SIGINT cancel all that it does and raise KeyboardInterrupt.

    It is cancelled anew every second until it ends: one cancellation was seen to get lost in an open HTTP request.
    """
    loop = asyncio.get_running_loop()
    waiting, task = asyncio.current_task(), asyncio.ensure_future(work)

    def cancel() -> None:
        for running in asyncio.all_tasks() - {waiting}:
            running.cancel()
        loop.call_later(_CANCEL_AGAIN_S, cancel)

    loop.add_signal_handler(signal.SIGINT, cancel)
    try:
        await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class Traffic:
    """One run; `records` and `scrapes` hold what has been seen so far, whenever it ends."""

    def __init__(self, options: TrafficOptions, prompts: list[Conversation]) -> None:
        self.options = options
        self.prompts = prompts
        self.records: list[Record] = []
        self.metrics_error: str | None = None  # why the last look at /metrics failed
        self._key = options.key()
        self._boundaries = boundaries(len(prompts))
        self.scrapes: list[Scrape | None] = [None] * (len(self._boundaries) + 1)
        self._finished = 0  # conversations
        self._start = self._end = 0.0

    @property
    def started(self) -> bool:
        return self._start > 0

    @property
    def duration_s(self) -> float:
        """From the first request to the end of the last finished conversation."""
        return self._end - self._start

    async def send(self) -> None:
        """Check the server, send every conversation and wait for the answers. Raises UserError (see `run`)."""
        import openai

        url = f"{self.options.root}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=self._key, max_retries=0) as client:
            sender = self._sender(client, await _pick_model(client, self.options))
            await self._scrape(client, 0)
            with _progress(len(self.prompts)) as advance:
                self._start = self._end = time.monotonic()
                await self._send_all(sender, advance)

    def _sender(self, client: "AsyncOpenAI", model: str) -> Sender:
        options = self.options
        sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature, "top_p": options.top_p}
        return Sender(client, {"model": model, **sampling}, options.timeout, options.send_domain)

    async def _send_all(self, sender: Sender, advance: Callable[[], None]) -> None:
        """Closed loop: workers that share one queue. Open loop: one task a conversation, asleep until it arrives."""

        async def converse(conversation: Conversation) -> None:
            await sender.converse(conversation, self.records)
            self._end = time.monotonic()
            advance()
            await self._count_finished(sender.client)

        async def work(queue: Iterator[Conversation]) -> None:
            for conversation in queue:
                await converse(conversation)

        async def arrive(delay_s: float, conversation: Conversation) -> None:
            await asyncio.sleep(delay_s)
            await converse(conversation)

        async with asyncio.TaskGroup() as tasks:
            if self.options.rate is None:
                queue = iter(self.prompts)
                for _ in range(self.options.concurrency):
                    tasks.create_task(work(queue))
                return
            delays = arrivals(self.options.rate, self.options.seed)
            for delay_s, conversation in zip(delays, self.prompts, strict=False):
                tasks.create_task(arrive(delay_s, conversation))

    async def _count_finished(self, client: "AsyncOpenAI") -> None:
        self._finished += 1
        if self._finished in self._boundaries:
            await self._scrape(client, 1 + self._boundaries.index(self._finished))

    async def _scrape(self, client: "AsyncOpenAI", index: int) -> None:
        """Look at /metrics; a server that has none, or refuses, leaves the acceptance unknown and the traffic going."""
        import openai

        address = f"{self.options.root}/metrics"
        try:
            page = await client.get(address, cast_to=str, options={"timeout": _START_TIMEOUT_S})
            self.scrapes[index] = parse_scrape(page)
        except (openai.OpenAIError, ValueError) as error:
            self.metrics_error = f"GET {address}: {one_line(error)}"


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process in seconds from the start, without end; the same for the same seed."""
    generator = random.Random(seed)
    return accumulate(generator.expovariate(each) for each in repeat(rate))


async def _pick_model(client: "AsyncOpenAI", options: TrafficOptions) -> str:
    """The model to ask for. Raises UserError when the server does not answer or does not list it."""
    import openai

    try:
        served = [model.id for model in (await client.models.list(timeout=_START_TIMEOUT_S)).data]
    except openai.APIConnectionError as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"no server answers at {options.root} ({reason}); start one with `aurora serve` or give its --url"
        ) from error
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise UserError(
            f"{options.root} refuses the API key (HTTP {error.status_code}); set AURORA_API_KEY to the server's"
        ) from error
    except (openai.OpenAIError, ValueError) as error:
        raise UserError(f"{options.root}/v1/models: {one_line(error)}; is this an OpenAI-compatible server?") from error
    if not served:
        raise UserError(f"{options.root} lists no model; give the --url of a server that serves one")
    if options.model is not None and options.model not in served:
        raise UserError(f"--model {options.model}: not served at {options.root}; choose one of {', '.join(served)}")
    return options.model or served[0]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; yields the function that advances it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("traffic"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("traffic", total=total)
        yield lambda: progress.advance(task)
