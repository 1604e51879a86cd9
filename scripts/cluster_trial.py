"""A Ray cluster of five machines on this host (head, router, two that serve, one that trains), and what it does.

sudo env PATH="$PATH" python -m scripts.cluster_trial --part faults --part canary --part transport
sudo env PATH="$PATH" python -m scripts.cluster_trial --part throughput --part policies --prompts prompts.jsonl

Each machine is a network namespace with an address, a cable and Ray's directory of its own; they share this host's
cores and files. Needs root and iproute2; run it from the repository's root. What it made is taken away at the end:
its namespaces, and the processes in them. Parts: throughput (1 and 2 replicas), policies (who answers a request),
faults (machines and cables lost under traffic), canary (a worse drafter), transport (drafters through Ray). The first
two serve --model and send --prompts, the others a tiny random model and made-up requests.
"""

import argparse
import math
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aurora.config import DEFAULT_MODEL, UserError
from aurora.results import Row, write_rows
from scripts import trial_faults, trial_rollout, trial_traffic
from scripts.trial_cluster import REPLICAS, ClusterServer, running
from tests.integration.conftest import LEARNING
from tests.integration.tiny_model import write_model

TINY = (
    *LEARNING,
    "--drafters=eagle3",
    "--fixed-k=2",
    "--set=trainer.keep_versions=1000",
    "--set=trainer.checkpoint_interval_s=5",
    "--set=cluster.canary_s=20",
    "--set=reporter.mode=disabled",
)
_SINK_MIB = 2  # holds the traces of a short cut, not those of a long one
_VERSIONS = 8  # swaps of each replica of which the transport is measured


@dataclass
class Work:
    """What a part is given."""

    options: argparse.Namespace
    directory: Path
    tiny: Path
    say: Callable[[str], None]  # one more step is done

    def keep(self, rows: Sequence[Row]) -> None:
        """Write rows where results are wanted."""
        if self.options.results is not None:
            write_rows(self.options.results, rows)

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", "scripts.cluster_trial", *sys.argv[1:]])


@dataclass(frozen=True)
class Table:
    """Of Markdown."""

    title: str
    heads: tuple[str, ...]
    lines: list[tuple[object, ...]]

    def __str__(self) -> str:
        rows = [self.heads, ("---",) * len(self.heads), *self.lines]
        return "\n".join([f"\n{self.title}\n", *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


Found = tuple[list[Row], list[Table]]


def faults(work: Work) -> Found:
    rows, lines = list[Row](), list[tuple[object, ...]]()
    wanted = trial_faults.chosen(work.options.fault)
    for durable in sorted({fault.durable for fault in wanted}, reverse=True):
        name = "faults" if durable else "faults-forgetful"
        with running(work.directory / name, durable=durable) as nodes:
            these = [fault for fault in wanted if fault.durable == durable]
            flags = (*TINY, f"--set=capture.sink_mib={_SINK_MIB}")
            for each in trial_faults.suffer_all(nodes, work.tiny, work.directory / f"{name}-run", flags, these):
                work.say(f"{each.fault}: {each}")
                rows += _fault_rows(each, "shared directory", work.command)
                lines.append(_fault_line(each))
                work.keep(rows)  # a later one may end it all
    return rows, [Table("Faults", _FAULT_HEADS, lines)]


_FAULT_HEADS = ("fault", "lasts, s", "failed", "silence, s", "recovered, s", "versions lost", "traces dropped")


def _fault_rows(each: trial_faults.Suffered, policy: str, command: str) -> Iterator[Row]:
    numbers = {
        "requests": each.requests,
        "failed": each.failed,
        "longest_silence_s": each.silence_s,
        "recovered_s": each.recovered_s,
        "versions_lost": each.versions_lost,
        "traces_dropped": each.traces_dropped,
    }
    for name, value in numbers.items():
        if math.isinf(value):  # it is not over, which the table says
            continue
        baseline = each.usual_silence_s if name == "longest_silence_s" else None
        yield Row("cluster_faults", each.fault, policy, name, float(value), baseline, command)


def _fault_line(each: trial_faults.Suffered) -> tuple[object, ...]:
    return (
        each.fault,
        f"{each.lasted_s:g}",
        f"{each.failed} of {each.requests}",
        f"{each.silence_s:.1f} ({each.usual_silence_s:.1f})",
        f"{each.recovered_s:.0f}",
        each.versions_lost,
        f"{each.traces_dropped:g}",
    )


def canary(work: Work) -> Found:
    with running(work.directory / "canary") as nodes:
        server = ClusterServer(
            nodes, str(work.tiny), work.directory / "canary-run", *TINY, "--set=cluster.canary_s=120"
        )
        try:
            server.wait_all()
            run = trial_rollout.try_worse(nodes, server)
        finally:
            server.stop()
    work.say(f"canary: {run}")
    numbers = {
        "rejected_after_s": run.rejected_after_s,
        "others_that_saw_it": run.others_saw_it,
        "requests": run.requests,
        "failed": run.failed,
    }
    rows = [
        Row("cluster_canary", "a worse drafter", "canary", name, float(v), None, work.command)
        for name, v in numbers.items()
    ]
    lines = [
        (name, ", ".join(map(str, sorted(run.seen[name]))), "yes" if run.worse in run.seen[name] else "no")
        for name in REPLICAS
    ]
    title = (
        f"Version {run.worse} was worse; rejected after {run.rejected_after_s:.0f} s ({run.reason}), "
        f"{run.failed} of {run.requests} requests failed"
    )
    return rows, [Table(title, ("replica", "versions seen", "the worse one"), lines)]


def transport(work: Work) -> Found:
    run_dir = work.directory / "transport-run"
    flags = (*TINY, "--set=cluster.transport=ray", f"--set=cluster.local_dir={work.directory / 'local'}")
    with running(work.directory / "transport", hidden=run_dir) as nodes:
        server = ClusterServer(nodes, str(work.tiny), run_dir, *flags)
        try:
            server.wait_all()
            assert trial_rollout.sees(nodes, "train", run_dir / "drafters")
            assert not trial_rollout.sees(nodes, "serve-a", run_dir / "drafters"), "the directory is hidden there"
            moved, stalls = trial_rollout.move_versions(nodes, server, work.options.versions)
            trial = trial_faults.Trial(nodes, server, lambda: server)
            (lost,) = (trial_faults.suffer(trial, f) for f in trial_faults.chosen(["trainer's machine lost"]))
        finally:
            server.stop()
    work.say(f"transport: {moved}, {lost}")
    rows = list(_fault_rows(lost, "through Ray", work.command))
    for each in moved:
        numbers = {"bytes": each.bytes_median, "seconds": each.seconds_median, "seconds_most": each.seconds_most}
        rows += [
            Row("cluster_transport", each.replica, "ray", name, v, None, work.command) for name, v in numbers.items()
        ]
    lines = [
        (m.replica, m.versions, m.swaps, f"{m.bytes_median:,.0f}", f"{m.seconds_median:.2f}", f"{m.seconds_most:.2f}")
        for m in moved
    ]
    heads = ("replica", "versions that came", "swaps", "bytes, median", "seconds, median", "most")
    title = f"Transport through Ray; longest stall of a swap {max(stalls):.4f} s"
    return rows, [Table(title, heads, lines), Table("The same", _FAULT_HEADS, [_fault_line(lost)])]


def throughput(work: Work) -> Found:
    return _traffic(work, "throughput", trial_traffic.replicas)


def policies(work: Work) -> Found:
    return _traffic(work, "policies", trial_traffic.policies)


def _traffic(work: Work, name: str, measure: Callable[..., Iterator[trial_traffic.Round]]) -> Found:
    options = work.options
    if options.prompts is None:
        raise UserError(f"--part {name} sends traffic: give --prompts FILE.jsonl")
    plan = trial_traffic.Plan(options.prompts, options.limit, options.concurrency, options.max_tokens, options.rounds)
    rounds = []
    with running(work.directory / name) as nodes:
        for each in measure(nodes, options.model, work.directory / f"{name}-run", tuple(options.serve), plan):
            work.say(f"{each.cell}, round {each.number}: {each.tokens_per_s:.1f} tokens/s, versions {each.versions}")
            rounds.append(each)
    summed = trial_traffic.summed(rounds)
    rows = [
        Row(f"cluster_{name}", each.workload, each.cell, metric, value, summed[0].numbers.get(metric), work.command)
        for each in summed
        for metric, value in each.numbers.items()
    ]
    return rows, [Table(name.capitalize(), trial_traffic.HEADS, [each.line for each in summed])]


PARTS: dict[str, Callable[[Work], Found]] = {
    "faults": faults,
    "canary": canary,
    "transport": transport,
    "throughput": throughput,
    "policies": policies,
}


def _steps(options: argparse.Namespace) -> int:
    counts = {
        "faults": len(trial_faults.chosen(options.fault)),
        "throughput": 2 * options.rounds,
        "policies": len(trial_traffic.POLICIES) * options.rounds,
    }
    return sum(counts.get(part, 1) for part in options.part)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tables: list[Table] = []
    directory = Path(tempfile.mkdtemp(prefix="trial-", dir=options.directory))
    print(f"files in {directory}", flush=True)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=_steps(options))

        def say(done: str) -> None:
            progress.console.print(done, markup=False, highlight=False)
            progress.advance(task)

        work = Work(options, directory, write_model(directory / "tiny"), say)
        for part in options.part:
            progress.update(task, description=part)
            rows, found = PARTS[part](work)
            tables += found
            work.keep(rows)
    for table in tables:
        print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--part", action="append", choices=list(PARTS), required=True, help="repeatable")
    add("--fault", action="append", default=[], help="faults whose names begin so; repeatable (default: all)")
    add("--versions", type=int, default=_VERSIONS, help="swaps of each replica of which the transport is measured")
    add("--model", default=DEFAULT_MODEL, help="served for throughput and policies (default: %(default)s)")
    add("--prompts", type=Path, help="JSONL with a `prompt` in each row, for throughput and policies")
    add("--limit", type=int, default=60, help="prompts a round")
    add("--concurrency", type=int, default=8)
    add("--max-tokens", type=int, default=96)
    add("--rounds", type=int, default=3, help="of each cell, in turns")
    add("--serve", action="append", default=[], help="a flag more for `aurora serve` of these two; repeatable")
    add(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where its own is made; kept (default: %(default)s)",
    )
    add("--results", type=Path, help="put rows of results there")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what was made is taken away then, too
    try:
        main()
    except UserError as error:
        sys.exit(f"cluster_trial: error: {error}")
