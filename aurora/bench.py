"""`aurora bench`: tokens per second with and without speculation, side by side in one run.

Every arm is a whole `aurora serve`; all of them are up at once and requests go to one at a time, in an order that turns
from round to round, so that whatever else the machine does hits all arms alike. Each round sends every arm the same
prompts; an arm's ratio is to `--no-speculation` within the round, and the median over the rounds is what counts. Tokens
per second are those of a full server, until one of the requests that may be open at once is missing. With `--json FILE`
a run that was cut off goes on where it stopped, and one that is complete is shown again. With `--url NAME=URL` the arms
are endpoints that run already, whatever serves them; the first one is what the others are compared with.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from aurora.bench_options import BenchOptions, Load, arms
from aurora.bench_result import BenchResult, Cell, Measurement, full_throughput, show
from aurora.config import UserError
from aurora.local_server import LocalServer
from aurora.prompts import Conversation, read_prompts
from aurora.report import BenchRun, versions, write_html
from aurora.results import read_rows, write_rows
from aurora.scrape import Scrape, parse_scrape, tokens_per_step
from aurora.sender import Record, Sender, one_line

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_FLAGS = {
    "datasets": "--dataset",
    "loads": "--concurrency",
    "urls": "--url",
}  # of options that are not named like theirs
_REQUEST_TIMEOUT_S = 600.0
_COUNTER_LIMIT_S = 30.0
_COUNTER_POLL_S = 0.1
_PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Which is larger, 9.11 or 9.9? Explain step by step.",
    "Translate to French: The library opens at nine and closes at six.",
    "Write an SQL query that counts the orders of each customer in 2023.",
    "Summarise the water cycle for a ten-year-old.",
    "A train travels 120 km in 1.5 hours. What is its average speed?",
    "List five ways to save energy at home.",
    "What is the difference between a list and a tuple in Python?",
    "Write a short letter to a landlord about a broken heater.",
    "Name the planets of the solar system in order of their distance from the sun.",
    "Give a recipe for pancakes with quantities.",
)


def run(options: BenchOptions) -> int:
    """Start the arms, measure, print the table; 0 when done. Raises UserError for what the user can mend."""
    prompts = _prompts(options)
    if options.results is not None:
        read_rows(options.results)  # one that is none must be known before the work
    result = measured(options)
    if not _is_complete(result, prompts, options):
        result = _measure_all(result, prompts, options)
    show(result)
    _keep(result, options, result.rows())
    if options.html is not None:
        write_html(options.html, [BenchRun(_title(options), result, _identity(options), versions())])
    if options.results is not None:
        write_rows(options.results, result.published(options.experiment, options.cell))
    return 0


def _title(options: BenchOptions) -> str:
    """Of its report."""
    baseline, *others = options.names
    return f"{', '.join(others)} against {baseline}" if options.urls else options.model


def _is_complete(result: BenchResult, prompts: Mapping[str, Sequence[Conversation]], options: BenchOptions) -> bool:
    done = {m.place for m in result.measurements}
    rounds = _rounds(prompts, options)
    return all((cell, arm, number) in done for cell, number, _ in rounds if number for arm in options.names)


def _measure_all(
    before: BenchResult, prompts: Mapping[str, Sequence[Conversation]], options: BenchOptions
) -> BenchResult:
    """Measure what is missing; starts the arms unless they are endpoints that run already."""
    if options.urls:
        return asyncio.run(measure(dict(options.urls), prompts, options, before=before))
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the servers end with us
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as scratch, ExitStack() as stack:
        servers: dict[str, LocalServer] = {}
        for name, flags in arms(options).items():
            server = LocalServer(options.model, Path(scratch) / name.replace(" ", "-"), flags)
            stack.callback(server.stop)
            print(f"starting: {name}", flush=True)
            try:
                server.wait_ready()  # one after the other: together they would starve each other
            except RuntimeError as error:
                reason = str(error).split("aurora: error: ")[-1].strip()
                raise UserError(f"the arm {name!r} did not start: {reason}") from error
            server.let_train(False)
            servers[name] = server
        urls = {name: server.url for name, server in servers.items()}

        def let_train(name: str, yes: bool) -> None:
            servers[name].let_train(yes)

        return asyncio.run(measure(urls, prompts, options, let_train, before))


def _identity(options: BenchOptions) -> dict[str, str]:
    """What must be the same for a run to go on, by name."""
    left_out = ["json_file", "html", "results", "experiment", "cell", "rounds"]
    left_out += ["arms", "model", "batch_table"] if options.urls else ["urls"]
    return {name: _said(value) for name, value in asdict(options).items() if name not in left_out}


def _said(value: object) -> str:
    """An option as its flag has it, or nearly so."""
    if value is None or value == ():
        return "-"
    if isinstance(value, tuple) and not isinstance(value, Load):
        return ", ".join(":".join(map(str, each)) if type(each) is tuple else str(each) for each in value)
    return str(value)


def measured(options: BenchOptions) -> BenchResult:
    """What an earlier run measured. Raises UserError when the file holds something else."""
    file = options.json_file
    if file is None or not file.exists():
        return BenchResult(baseline=options.names[0])
    try:
        kept = json.loads(file.read_text())
        found = BenchResult.of(kept)
        differs = [name for name, value in _identity(options).items() if kept["options"].get(name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--json {file}: exists and is no bench to go on with ({error!r}); give another") from error
    if differs:
        flag = _FLAGS.get(differs[0], "--" + differs[0].replace("_", "-"))
        raise UserError(f"--json {file}: holds a bench with another {flag}; give another file, or remove it")
    return found


def _keep(result: BenchResult, options: BenchOptions, rows: Iterable[object] = ()) -> None:
    """Write what was measured so far, if asked to; rows: of the table, once it is complete."""
    file = options.json_file
    if file is None:
        return
    content = {
        "options": _identity(options),
        "baseline": result.baseline,
        "versions": versions(),
        "rows": list(rows),
        "rounds": [asdict(m) for m in result.measurements],
        "step_costs": result.step_costs,
    }
    staging = file.with_suffix(".part")
    staging.write_text(json.dumps(content, indent=1))
    staging.replace(file)


async def measure(
    servers: dict[str, str],
    prompts: Mapping[str, Sequence[Conversation]],
    options: BenchOptions,
    let_train: Callable[[str, bool], None] = lambda _name, _yes: None,
    before: BenchResult | None = None,
) -> BenchResult:
    """Send the rounds of each data set's prompts to the servers (name -> URL). A short first one warms up, uncounted.

    let_train: is told whose trainer may compute, because on an idle server it takes all it gets. before: what need not
    be measured again.
    """
    result = BenchResult(baseline=next(iter(servers))) if before is None else before
    done = {m.place for m in result.measurements}
    names = list(servers)
    with Progress(console=Console(stderr=True)) as progress:
        rounds = list(_rounds(prompts, options))
        task = progress.add_task("bench", total=len(rounds) * len(names))
        for cell, number, batch in rounds:
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                if (cell, name, number) not in done:
                    let_train(name, True)
                    found = await _send(servers[name], batch, cell, options)
                    let_train(name, False)
                    if number:
                        result.measurements.append(
                            Measurement(cell.dataset, cell.concurrency, cell.temperature, name, number, *found)
                        )
                        _keep(result, options)
                progress.advance(task)
    for url in servers.values():
        result.step_costs = await _step_costs(url, options) or result.step_costs
    return result


def _rounds(
    prompts: Mapping[str, Sequence[Conversation]], options: BenchOptions
) -> Iterator[tuple[Cell, int, list[Conversation]]]:
    """Cell, number and prompts of each round, all cells one after the other: a run that is cut off has some of each.

    None repeats the prompts of another while there are new ones.
    """
    sent = dict.fromkeys(prompts, 0)
    for number in range(options.rounds + 1):
        for dataset, mine in prompts.items():
            for load in options.loads:
                count = (options.requests if number else 1) * load.concurrency
                yield Cell(dataset, *load), number, [mine[(sent[dataset] + i) % len(mine)] for i in range(count)]
                sent[dataset] += count


async def _step_costs(url: str, options: BenchOptions) -> dict[str, float]:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=_api_key(), max_retries=0) as client:
        return (await _scrape(client, url, options)).step_costs


async def _send(
    url: str, batch: Sequence[Conversation], cell: Cell, options: BenchOptions
) -> tuple[float, float | None, int, tuple[float, ...]]:
    """Tokens/s, tokens per decode step, tokens and latencies of one batch, as many requests at a time as cell says."""
    import openai

    records: list[Record] = []
    queue = iter(batch)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=_api_key(), max_retries=0) as client:
        model = await _model(client, url)
        fields = {"model": model, "temperature": cell.temperature, "max_tokens": options.max_tokens}
        sender = Sender(client, fields, _REQUEST_TIMEOUT_S)

        async def work() -> None:
            for conversation in queue:
                await sender.converse(conversation, records)

        before = await _scrape(client, url, options)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(cell.concurrency):
                tasks.create_task(work())
        failed = [r.error for r in records if r.error is not None]
        if failed:
            raise UserError(f"{url}: {len(failed)} of {len(records)} requests failed, the first with: {failed[0]}")
        tokens = sum(r.completion_tokens for r in records)
        after = await _scrape_after(client, url, before, tokens, options)
    return full_throughput(records), tokens_per_step(before, after), tokens, tuple(r.latency_s for r in records)


def _api_key() -> str:
    return os.environ.get("AURORA_API_KEY") or "none"


async def _model(client: "AsyncOpenAI", url: str) -> str:
    """The first model that the endpoint lists. Raises UserError where none answers or none is listed."""
    import openai

    try:
        return (await client.models.list()).data[0].id
    except (openai.OpenAIError, IndexError) as error:
        raise UserError(f"{url}: lists no model ({one_line(error)}); start it, or correct --url") from error


async def _scrape(client: "AsyncOpenAI", url: str, options: BenchOptions) -> Scrape:
    """The endpoint's counters; one that we did not start need not have any."""
    import openai

    try:
        return parse_scrape(await client.get(f"{url}/metrics", cast_to=str))
    except (openai.APIStatusError, ValueError):
        if options.urls:
            return Scrape()
        raise


async def _scrape_after(client: "AsyncOpenAI", url: str, before: Scrape, tokens: int, options: BenchOptions) -> Scrape:
    """The counters once they hold `tokens` more: they lag the engine by a collection. Without speculation: as they are.

    Raises UserError when they do not get there: then tokens are not counted as they should be.
    """
    end = time.monotonic() + _COUNTER_LIMIT_S
    while (after := await _scrape(client, url, options)).live_version is not None:
        if after.emitted - before.emitted >= tokens:
            break
        if time.monotonic() > end:
            counted = after.emitted - before.emitted
            raise UserError(f"{url}/metrics counts {counted:.0f} tokens of {tokens}: are others using this server?")
        await asyncio.sleep(_COUNTER_POLL_S)
    return after


def _prompts(options: BenchOptions) -> dict[str, list[Conversation]]:
    """By the name of their data set."""
    if not options.datasets:
        return {"own prompts": [Conversation((text,)) for text in _PROMPTS]}
    return {Path(name).stem: read_prompts(name, variant=options.variant) for name in options.datasets}
