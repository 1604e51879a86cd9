"""A report as one HTML page that loads nothing: tables, and plots of a bench as SVG in the page."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aurora.bench_result import BenchResult, Cell, RowValue, cell_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNNAMED = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # nothing about who made the picture
_NAMESPACES = re.compile(r"\sxmlns(:\w+)?=\"[^\"]*\"")  # which HTML knows
_WIDTH, _HEIGHT = 5.6, 3.2  # inches
_WIDE, _ROW = 8.0, 0.16  # of the plot of ratios, and of an arm in it
_BASELINE_COLOUR = "0.55"
_INTERVAL = ("ratio", "ratio_low", "ratio_high")


class Grid(NamedTuple):
    """A table as text."""

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Part:
    """A table and its pictures."""

    title: str  # "" where the section's says it all
    grid: Grid | None = None
    plots: Sequence[tuple[str, str]] = ()  # caption, SVG


@dataclass(frozen=True)
class Section:
    """What a report says of one run, or of several together."""

    title: str
    parts: Sequence[Part]
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # heading -> name -> value


def page(sections: Sequence[Section]) -> str:
    """The page. Everything but the plots is escaped."""
    import jinja2

    source = files("aurora").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(sections=sections)


def ratio_plot(result: BenchResult, rows: Sequence[Mapping[str, RowValue]]) -> str:
    """Median ratio of each arm to the baseline and its 95 % interval, all cells in one picture, as SVG.

    rows: those of the result.
    """
    arms = result.arms[1:]
    figure, panel = _figure(_WIDE, _ROW * (len(arms) + 1) * len(result.cells) + 1.2)
    panel.axvline(1, color=_BASELINE_COLOUR, linewidth=1)
    for below, arm in enumerate(arms, 1):
        mine = [row for row in rows if row["arm"] == arm]
        places = [result.cells.index(cell_of(row)) + below / (len(arms) + 1) - 0.5 for row in mine]
        middle, low, high = (np.array([row[name] for row in mine], float) for name in _INTERVAL)
        off = np.nan_to_num([middle - low, high - middle])  # a single round has no interval
        panel.errorbar(middle, places, xerr=off, fmt="o", markersize=4, color=_colours(result)[arm], label=arm)
    panel.set_yticks(range(len(result.cells)), [str(cell) for cell in result.cells])
    panel.set_ylim(len(result.cells) - 0.5, -0.5)
    panel.set_xlabel(f"tokens/s over {result.baseline}")
    return _svg(figure, panel, legend="outside right upper")


def speed_plot(result: BenchResult, cell: Cell) -> str:
    """Tokens per second of each arm over the rounds, as SVG."""
    figure, panel = _figure()
    for arm, colour in _colours(result).items():
        mine = result.of_arm(arm, cell)
        speeds = [m.tokens_per_s for m in mine]
        panel.plot([m.round for m in mine], speeds, marker="o", markersize=3, color=colour, label=arm)
    panel.set_xlabel("round")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_ylabel("tokens/s")
    panel.set_ylim(bottom=0)
    return _svg(figure, panel)


def latency_plot(result: BenchResult, cell: Cell) -> str:
    """Share of each arm's requests that were answered within a time, as SVG."""
    figure, panel = _figure()
    for arm, colour in _colours(result).items():
        seconds = np.sort([s for m in result.of_arm(arm, cell) for s in m.latency_s])
        if len(seconds):
            shares = np.arange(1, len(seconds) + 1) / len(seconds)
            panel.step(seconds, shares, where="post", color=colour, label=arm)
    panel.set_xlabel("latency of a request, s")
    panel.set_ylabel("share of requests")
    panel.set_ylim(0, 1.02)
    return _svg(figure, panel)


def _colours(result: BenchResult) -> dict[str, str]:
    """Of each arm, the same in all plots; the baseline is grey."""
    baseline, *others = result.arms
    return {baseline: _BASELINE_COLOUR} | {arm: f"C{i}" for i, arm in enumerate(others)}


def _figure(width: float = _WIDTH, height: float = _HEIGHT) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: "Figure", panel: Any, legend: str = "") -> str:
    """The figure as an element of an HTML page; its text stays text. legend: its place if it is outside the panel."""
    import matplotlib as mpl

    panel.grid(alpha=0.3)
    if legend:
        panel.figure.legend(loc=legend, fontsize="small")
    else:
        panel.legend(fontsize="small")
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aurora"}):
        figure.savefig(out, format="svg", metadata=_UNNAMED)
    svg = out.getvalue()
    return _NAMESPACES.sub("", svg[svg.index("<svg") :])
