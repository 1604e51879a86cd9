"""`aurora curves`: replays of the same requests as curves over the requests, one a policy, in one PNG file.

The upper panel has every request in its order; where the domain changes for good a line marks the shift, and where
domains come in turns or mixed the lower panels tell them apart: one a domain, over its own requests.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aurora.config import UserError, require_positive, require_writable
from aurora.replay_result import legs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]
_MAX_LEGS = 24  # shifts to mark; with more the order counts as mixed


@dataclass(frozen=True)
class CurveOptions:
    """What to draw; `aurora curves` has a flag for each. Raises UserError for values that make no sense."""

    files: tuple[Path, ...]  # of `aurora replay --json`
    out: Path
    window: int = 25  # requests
    title: str = ""

    def __post_init__(self) -> None:
        require_positive(self, "window")
        require_writable("--out", self.out)
        if self.out.suffix != ".png":
            raise UserError(f"--out {self.out}: must end in .png")


@dataclass(frozen=True)
class Curve:
    """One replay: what each request emitted a verification step, in the order of arrival."""

    policy: str
    domains: tuple[str, ...]  # of each request
    emitted: Floats  # [requests] tokens after the first
    steps: Floats  # [requests]

    def rolling(self, window: int, domain: str | None = None) -> Floats:
        """Tokens per decode step over each `window` requests in a row, of one domain if it is given; [n - window + 1].

        Empty for fewer than `window` requests.
        """
        mine = np.array([domain in (None, d) for d in self.domains])
        sums = [np.convolve(values[mine], np.ones(window), "valid") for values in (self.emitted, self.steps)]
        if mine.sum() < window:
            return np.zeros(0)
        rates: Floats = sums[0] / np.maximum(sums[1], 1.0)
        return rates


def run(options: CurveOptions) -> int:
    """Draw. Raises UserError naming a file that cannot be drawn or does not fit the others."""
    curves = [read_curve(file) for file in options.files]
    for curve, file in zip(curves, options.files, strict=True):
        if curve.domains != curves[0].domains:
            raise UserError(f"{file}: not the requests of {options.files[0]}; draw replays of one order only")
    if len(curves[0].domains) < options.window:
        raise UserError(f"--window {options.window}: there are {len(curves[0].domains)} requests only; lower it")
    _draw(curves, options)
    print(f"{options.out}: {len(curves)} curves over {len(curves[0].domains)} requests")
    return 0


def read_curve(file: Path) -> Curve:
    """Raises UserError for a file that `aurora replay --json` did not write."""
    try:
        result: dict[str, Any] = json.loads(file.read_text())
        requests = result["requests"]
        return Curve(
            policy=str(result["policy"]),
            domains=tuple(str(r["domain"]) for r in requests),
            emitted=np.array([r["steps"] + r["accepted"] for r in requests], np.float64),
            steps=np.array([r["steps"] for r in requests], np.float64),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: {error!r}; give files that `aurora replay --json` wrote") from error


def _draw(curves: Sequence[Curve], options: CurveOptions) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(curves[0].domains))
    shifts = legs(curves[0].domains)
    apart = domains if 1 < len(domains) < len(shifts) else []
    figure = Figure(figsize=(10, 4 + 2.2 * len(apart)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 + len(apart), squeeze=False)[:, 0]
    for panel, domain in zip(panels, [None, *apart], strict=True):
        _plot(panel, curves, options.window, domain)
    if len(shifts) <= _MAX_LEGS:
        _mark(panels[0], shifts)
    panels[0].legend(loc="upper left", fontsize="small")
    panels[-1].set_xlabel("requests")
    figure.suptitle(options.title)
    figure.savefig(options.out, dpi=120)


def _plot(panel: "Axes", curves: Sequence[Curve], window: int, domain: str | None) -> None:
    for curve in curves:
        rates = curve.rolling(window, domain)
        panel.plot(np.arange(len(rates)) + window, rates, label=curve.policy, linewidth=1.2)
    panel.set_ylabel("tokens per step" if domain is None else domain)
    panel.grid(alpha=0.3)


def _mark(panel: "Axes", shifts: Sequence[tuple[str, range]]) -> None:
    for domain, places in shifts:
        panel.axvline(places.start, color="grey", linestyle=":", linewidth=1)
        panel.annotate(domain, (places.start, 1.0), xycoords=("data", "axes fraction"), fontsize="x-small", va="bottom")
