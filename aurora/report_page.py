"""A report as one HTML page that loads nothing: tables, and plots of a bench as SVG in the page."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aurora.bench_result import BenchResult, Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNNAMED = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # nothing about who made the picture
_NAMESPACES = re.compile(r"\sxmlns(:\w+)?=\"[^\"]*\"")  # which HTML knows
_SIZE = (6.4, 3.2)  # inches


class Grid(NamedTuple):
    """A table as text."""

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    title: str
    grids: Sequence[Grid]
    plots: Sequence[tuple[str, str]] = ()  # caption, SVG
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # heading -> name -> value


def page(sections: Sequence[Section]) -> str:
    """The page. Everything but the plots is escaped."""
    import jinja2

    source = files("aurora").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(sections=sections)


def speed_plot(result: BenchResult, cell: Cell) -> str:
    """Tokens per second of each arm over the rounds, as SVG."""
    figure, panel = _figure()
    for arm in result.arms:
        mine = result.of_arm(arm, cell)
        panel.plot([m.round for m in mine], [m.tokens_per_s for m in mine], marker="o", markersize=3, label=arm)
    panel.set_xlabel("round")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_ylabel("tokens/s")
    panel.set_ylim(bottom=0)
    return _svg(figure, panel)


def latency_plot(result: BenchResult, cell: Cell) -> str:
    """Share of each arm's requests that were answered within a time, as SVG."""
    figure, panel = _figure()
    for arm in result.arms:
        seconds = np.sort([s for m in result.of_arm(arm, cell) for s in m.latency_s])
        if len(seconds):
            panel.step(seconds, np.arange(1, len(seconds) + 1) / len(seconds), where="post", label=arm)
    panel.set_xlabel("latency of a request, s")
    panel.set_ylabel("share of requests")
    panel.set_ylim(0, 1.02)
    return _svg(figure, panel)


def _figure() -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _svg(figure: "Figure", panel: Any) -> str:
    """The figure as an element of an HTML page; its text stays text."""
    import matplotlib as mpl

    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aurora"}):
        figure.savefig(out, format="svg", metadata=_UNNAMED)
    svg = out.getvalue()
    return _NAMESPACES.sub("", svg[svg.index("<svg") :])
