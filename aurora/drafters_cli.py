"""The flags of `aurora drafters` and what it prints."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from aurora.terminal_text import age

if TYPE_CHECKING:
    from rich.console import Console

    from aurora.drafter_commands import StoreOptions

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_WIDTH = 120  # columns where the output is no terminal


def add_drafters_command(commands: _Commands) -> None:
    """Add `drafters` and its commands."""
    drafters = commands.add_parser("drafters", help="versions of a run's drafter", allow_abbrev=False)
    each = drafters.add_subparsers(required=True, metavar="COMMAND")
    listing = _add(each, "list", _list, "its versions", as_json=True)
    listing.add_argument("--url", help="server that counted the live acceptance, e.g. http://127.0.0.1:8000")
    listing.add_argument("--api-key-file", type=Path, metavar="FILE", help="its key; default: AURORA_API_KEY")
    _add(each, "show", _show, "one version, its files checked", as_json=True).add_argument("number", type=_version)
    diff = _add(each, "diff", _diff, "how far one version is from another", as_json=True)
    diff.add_argument("first", type=_version, metavar="A")
    diff.add_argument("second", type=_version, metavar="B")
    back = _add(each, "rollback", _rollback, "take everything newer than a version out of use, for good")
    back.add_argument("number", type=_version, nargs="?", metavar="N", help="default: the one before the latest")
    back.add_argument("--reason", default="rolled back by hand", metavar="TEXT", help="kept with the rejected versions")
    back.add_argument("--yes", action="store_true", help="do not ask")
    export = _add(each, "export", _export, "copy a version for stock `vllm serve`")
    export.add_argument("number", type=_version, metavar="N")
    export.add_argument("directory", type=Path, metavar="DIR", help="new directory")
    intake = _add(each, "import", _import, "check a drafter from elsewhere and publish it as the next version")
    intake.add_argument("directory", type=Path, metavar="DIR")
    intake.add_argument("--model", help="target that it must fit; default: that of the newest usable version")


def _add(
    commands: _Commands, name: str, run: Callable[..., int], short: str, *, as_json: bool = False
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=short, description=short[:1].upper() + short[1:] + ".", allow_abbrev=False)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/default"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--kind", choices=("eagle3", "model"), default="eagle3", help="default: %(default)s")
    if as_json:
        parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, passes_rest=False)
    return parser


def _version(text: str) -> int:
    """`7`, or as its directory is named, `v000007`. Raises ArgumentTypeError."""
    digits = text.removeprefix("v")
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: no version; give its number, such as 7 or v000007")
    return int(digits)


def _options(known: argparse.Namespace) -> "StoreOptions":
    from aurora.drafter_commands import StoreOptions

    return StoreOptions(known.run_dir, known.kind)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def _list(known: argparse.Namespace, _rest: list[str]) -> int:
    from rich.table import Table
    from rich.text import Text

    from aurora.drafter_commands import listed

    live = _live(known) if known.url else None
    rows = listed(_options(known), live)
    if known.as_json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("version", "state", "age", "parent", "gate", "live", "trained on", "size", "said of it", box=None)
    for row in rows:
        state = Text(row["state"], {"latest": "green", "rejected": "yellow", "damaged": "red"}.get(row["state"], ""))
        gate = _length(row["gate_acceptance"])
        if row["parent_acceptance"] is not None:
            gate = f"{_length(row['parent_acceptance'])} -> {gate}"
        tokens = "-" if row["tokens_trained"] is None else f"{row['tokens_trained']:,}"
        size, old = f"{row['size'] / (1 << 20):.1f} MiB", age(time.time() - row["published_s"])
        parent = "-" if row["parent"] is None else str(row["parent"])
        said = Text(row["reason"] or row["origin"])
        table.add_row(str(row["number"]), state, old, parent, gate, _length(row["live_acceptance"]), tokens, size, said)
    _console().print(table if rows else "no version yet")
    return 0


def _live(known: argparse.Namespace) -> dict[int, float | None]:
    """Acceptance length of each version since the server's start."""
    from aurora.config import UserError
    from aurora.endpoint import Endpoint, NoAnswer, read_client_key
    from aurora.scrape import parse_samples
    from aurora.status import acceptance_by_version, check_aurora

    endpoint = Endpoint.open(known.url, read_client_key(known.api_key_file))
    try:
        samples = parse_samples(endpoint.page("/metrics"))
    except NoAnswer as error:
        raise UserError(f"{error}; leave --url out") from error
    check_aurora(samples, endpoint.root)
    found = acceptance_by_version(samples)
    return {(-number if known.kind == "model" else number): length for number, length in found.items()}


def _length(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show(known: argparse.Namespace, _rest: list[str]) -> int:
    import yaml

    from aurora.drafter_commands import described

    told = described(_options(known), known.number)
    if known.as_json:
        print(json.dumps(told, indent=2))
        return int(bool(told["damage"]))
    published = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["published_s"]))
    damage = told["damage"] or "none, every SHA-256 is that of the publication"
    said = {**told, "published_s": published, "damage": damage}
    print(yaml.safe_dump(said, sort_keys=False, allow_unicode=True), end="")
    return int(bool(told["damage"]))


def _diff(known: argparse.Namespace, _rest: list[str]) -> int:
    from rich.table import Table

    from aurora.drafter_commands import difference

    found = difference(_options(known), known.first, known.second)
    if known.as_json:
        print(json.dumps(found, indent=2))
        return 0
    said = Table("metadata", f"version {known.first}", f"version {known.second}", box=None)
    for key, (before, after) in found["metadata"].items():
        said.add_row(key, _plain(before), _plain(after))
    moved = Table("tensor", "shape", "relative change", "norm", box=None)
    for tensor in found["tensors"]:
        relative = "-" if tensor["relative"] is None else f"{100 * tensor['relative']:.3f} %"
        shape = " x ".join(map(str, tensor["shape"]))
        moved.add_row(tensor["name"], shape, relative, f"{tensor['norm_first']:.4g} -> {tensor['norm_second']:.4g}")
    console = _console()
    console.print(said)
    console.print(moved)
    for name in found["odd"]:
        console.print(f"{name}: in one of them only, or in another shape", markup=False)
    added, removed = len(found["added"]), len(found["removed"])
    console.print(f"draft vocabulary: {found['vocabulary']:,} tokens, {added:,} new, {removed:,} gone")
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _rollback(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.drafter_commands import confirmed, roll_back, rollback_target

    options = _options(known)
    number, newer = rollback_target(options, known.number)
    said = ", ".join(map(str, newer))
    if not confirmed(f"Reject version {said} for good, so that servers go back to version {number}?", known.yes):
        print("nothing was changed")
        return 1
    taken = roll_back(options, number, known.reason)
    print(f"version {number} is the latest; rejected: {', '.join(map(str, sorted(taken)))}")
    return 0


def _export(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.drafter_commands import export

    directory = export(_options(known), known.number, known.directory)
    method = "eagle3" if known.kind == "eagle3" else "draft_model"
    speculation = json.dumps({"method": method, "model": str(directory), "num_speculative_tokens": 3})
    print(f"{directory}: version {known.number}; vllm serve TARGET --speculative-config '{speculation}'")
    reason = _options(known).open().rejection(known.number)
    if reason is not None:
        print(f"aurora: version {known.number} is rejected: {reason or 'nobody said why'}", file=sys.stderr)
    return 0


def _import(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.config import cache_root
    from aurora.drafter_commands import take_in

    version = take_in(_options(known), known.directory, known.model, cache_root())
    print(f"{version.path}: version {version.number} is the latest; servers of this run directory take it up")
    return 0
