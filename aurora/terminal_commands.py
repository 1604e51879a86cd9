"""The commands that look after a running deployment: `status`, `top`, `drafters` and `doctor`, with their flags.

Each imports what it needs when it runs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TypeAlias

from aurora.drafters_cli import add_drafters_command
from aurora.options import add_config_options, read_config

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_terminal_commands(commands: _Commands) -> None:
    """Add them to `aurora`'s commands."""
    status = commands.add_parser("status", help="what a running server does now", allow_abbrev=False)
    status.description = "What a running server does now; exit code 1 while it is not ready or an alarm is raised."
    _add_watch_options(status)
    status.set_defaults(run=_status, passes_rest=False, count=None)
    top = commands.add_parser("top", help="the same, live", allow_abbrev=False)
    top.description = (
        "What a running server does, live; q or Ctrl-C ends it. One line a look where there is no terminal."
    )
    _add_watch_options(top)
    top.add_argument("--count", type=int, metavar="N", help="end after N looks")
    top.set_defaults(run=_top, passes_rest=False)
    add_drafters_command(commands)
    doctor = commands.add_parser("doctor", help="say what this machine lacks", allow_abbrev=False)
    doctor.description = (
        "What on this machine will fail or costs speed, for a server with these flags of `aurora serve`."
    )
    add_config_options(doctor)
    doctor.add_argument("--json", dest="as_json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor, passes_rest=False)


def _add_watch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_url = "server; repeat it for several replicas (default: http://127.0.0.1:8000)"
    add("--url", dest="urls", action="append", default=[], metavar="URL", help=help_url)
    add("--api-key-file", type=Path, metavar="FILE", help="file whose first line is the key; default: AURORA_API_KEY")
    add("--run-dir", type=Path, metavar="DIR", help="the server's, to show its drafter store too")
    add("--interval", type=float, default=2.0, metavar="S", help="time between two looks (default: %(default)s)")
    add("--json", dest="as_json", action="store_true", help="print JSON, one object a look")


def _watch_options(known: argparse.Namespace) -> Any:
    from aurora.watch import WatchOptions

    flags = {name: value for name, value in vars(known).items() if name not in ("run", "passes_rest", "urls")}
    return WatchOptions(urls=tuple(known.urls), **flags)


def _status(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.top import run_status

    return run_status(_watch_options(known))


def _top(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.top import run_top

    return run_top(_watch_options(known))


def _doctor(known: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from aurora.environment import diagnose
    from aurora.machine import examine

    findings = [*diagnose(), *examine(read_config(known, rest))]
    if known.as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table("", "check", "found", "remedy", box=None)
        for finding in findings:
            mark = "[red]fails" if finding.fatal else "[yellow]lacks" if finding.remedy else "[green]ok"
            table.add_row(mark, finding.name, finding.value, finding.remedy)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(any(finding.fatal for finding in findings))
