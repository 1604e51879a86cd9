"""Where the reporter writes when it is not W&B: TensorBoard's event files, or lines of JSON.

A sink takes rows behind an axis, tables, published drafters and alerts. Values of a row are numbers, arrays of counts
by index, or a `Table`. What a sink raises costs the row, which the reporter counts.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from aurora.alerts import Alert
from aurora.config import AuroraConfig, UserError


class Table(NamedTuple):
    """Rows of text and numbers under column names."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


class Drafter(NamedTuple):
    """A published version: what its publisher said of it, and where it lies, if it can be read from here."""

    kind: str  # `drafter` or `draft_model`
    number: int
    metadata: Mapping[str, Any]  # parent, gate's results, SHA-256 of its files
    directory: Path | None


class Sink(Protocol):
    """What the reporter writes to."""

    def define(self, group: str, axis: str) -> None:
        """Rows of `group/*` are over `axis`."""

    def log(self, axis: str, at: float, values: Mapping[str, Any]) -> None:
        """One row."""

    def drafter(self, drafter: Drafter) -> None:
        """A version was published."""

    def alert(self, alert: Alert) -> None:
        """Something a person should hear of."""

    def finish(self) -> None:
        """Write what is left; nothing is called after it."""


class JsonlSink:
    """One JSON object a line, in a new file of `run_dir/report` for each start."""

    def __init__(self, config: AuroraConfig, settings: Mapping[str, Any]) -> None:
        """settings: the effective configuration, without secrets; the first line."""
        directory = config.run_dir / "report"
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / f"{_name()}.jsonl"
        self._lines = self.file.open("x", encoding="utf-8")
        self._write({"config": dict(settings)})

    def define(self, group: str, axis: str) -> None:
        self._write({"group": group, "axis": axis})

    def log(self, axis: str, at: float, values: Mapping[str, Any]) -> None:
        self._write({axis: at, **{name: _plain(value) for name, value in values.items()}})

    def drafter(self, drafter: Drafter) -> None:
        self._write({"published": {**_described(drafter), "directory": str(drafter.directory or "")}})

    def alert(self, alert: Alert) -> None:
        self._write({"alert": alert._asdict(), "time_s": time.time()})

    def finish(self) -> None:
        self._lines.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()


class TensorBoardSink:
    """Event files in a new directory of `run_dir/tensorboard` for each start; steps are the axis, in whole numbers."""

    def __init__(self, config: AuroraConfig, settings: Mapping[str, Any]) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.directory = config.run_dir / "tensorboard" / _name()
        self._writer: Any = SummaryWriter(str(self.directory))
        self._writer.add_text("config", f"```\n{json.dumps(settings, indent=1)}\n```")

    def define(self, group: str, axis: str) -> None:
        """A row's axis comes with it."""

    def log(self, axis: str, at: float, values: Mapping[str, Any]) -> None:
        step, now_s = int(at), at if axis == "time_s" else time.time()
        for name, value in values.items():
            if isinstance(value, Table):
                self._writer.add_text(name, _markdown(value), step, now_s)
            elif isinstance(value, np.ndarray):
                self._histogram(name, value, step, now_s)
            else:
                self._writer.add_scalar(name, value, step, now_s)

    def _histogram(self, name: str, counts: np.ndarray, step: int, now_s: float) -> None:
        at = np.arange(len(counts))
        self._writer.add_histogram_raw(
            name,
            min=0,
            max=len(counts) - 1,
            num=int(counts.sum()),
            sum=float(counts @ at),
            sum_squares=float(counts @ at**2),
            bucket_limits=(at + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
            walltime=now_s,
        )

    def drafter(self, drafter: Drafter) -> None:
        text = f"```\n{json.dumps(_described(drafter), indent=1)}\n```"
        self._writer.add_text(f"published/{drafter.kind}", text, drafter.number)

    def alert(self, alert: Alert) -> None:
        self._writer.add_text(f"alerts/{alert.kind}", alert.text, int(time.time()))

    def finish(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raise UserError when TensorBoard's writer is not installed."""
    if find_spec("tensorboard") is None:
        raise UserError(
            "--reporter-sink tensorboard: the package tensorboard is not installed; "
            "`pip install 'aurora-specdec[dashboard]'`, or choose jsonl"
        )


def _name() -> str:
    """Of a new file or directory; a restarted reporter never meets its predecessor's."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"


def _described(drafter: Drafter) -> dict[str, Any]:
    return {"kind": drafter.kind, "number": drafter.number, **drafter.metadata}


def _plain(value: Any) -> Any:
    if isinstance(value, Table):
        return value._asdict()
    return value.tolist() if isinstance(value, np.ndarray) else value


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "\\n")
