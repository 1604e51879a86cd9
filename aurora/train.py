"""`aurora train`: trains a drafter on what was logged, without a server.

LOG is a directory of traces that a server wrote (`capture.log_dir`) or a recording (`aurora record`). The trainer is
the one that runs beside the server, with its losses, its policy gradient with discounted returns on the logged drafts
(`trainer.rl`), and its gate on requests kept out of training: what passes it is written as a drafter's directory.
Staleness counts from the newest drafter version in the log. Of several seeds nothing is kept but what they gained.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aurora.config import AuroraConfig, UserError, load_config, require_positive, require_writable
from aurora.options import trainer_settings
from aurora.results import Row, command_line, half_width, read_rows, write_rows
from aurora.store import DrafterRefused
from aurora.trace import decode_traces, encode_traces
from aurora.trace_log import is_log, log_files, logged_model

if TYPE_CHECKING:
    from trainer.gate import Verdict
    from trainer.loop import TrainerLoop

_PASSES = 8  # over the rows, unless told how many steps
_GATE_SEQUENCES = 64  # unless told: there is time to judge well


@dataclass(frozen=True)
class TrainOptions:
    """What to train on and how; `aurora train` has a flag for each. Raises UserError for values that make no sense."""

    log: Path
    out: Path | None = None
    model: str | None = None  # None: the one that was logged
    drafter: Path | None = None  # None: made from the target
    draft_vocab: int = 8192
    steps: int | None = None
    seed: int = 0
    seeds: int = 1  # trainings with this many seeds, from `seed` on; more than one give a confidence interval
    settings: tuple[str, ...] = ()  # trainer.KEY=VALUE: how to train
    results: Path | None = None  # file of rows (`aurora.results`)
    experiment: str = "train"  # name of these rows
    cell: str = ""  # what was trained how, in these rows; default: the log's name

    def __post_init__(self) -> None:
        require_positive(self, "steps", "draft_vocab", "seeds")
        require_writable("--results", self.results)
        if not self.log.is_dir():
            raise UserError(f"{self.log}: no such directory; give one of traces (capture.log_dir) or a recording")
        if self.out is None and self.seeds == 1 and self.results is None:
            raise UserError("--out: give a new directory for the drafter, or --seeds or --results to measure only")
        if self.out is not None:
            self._check_out(self.out)
        load_config(None, trainer_settings(self.settings))

    def _check_out(self, out: Path) -> None:
        if self.seeds > 1:
            raise UserError(f"--out {out}: --seeds {self.seeds} trains as many; keep the one of a single seed")
        if out.exists():
            raise UserError(f"--out {out}: it exists; give a new directory")
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out {out}: its parent does not exist; create it first")


def run(options: TrainOptions) -> int:
    """Train, judge, write; 1 when what came out is no better. Raises UserError for what the user can mend."""
    source: Log | Recorded = Log(options.log) if is_log(options.log) else Recorded(options.log)
    if options.results is not None:
        read_rows(options.results)  # one that is none must be known before the work
    trials = [_trial(replace(options, seed=options.seed + n), source) for n in range(options.seeds)]
    lengths = [trial.verdict.candidate.length for trial in trials]
    first, steps = trials[0].verdict, trials[0].steps
    before, after = first.live.length, sum(lengths) / len(lengths)
    spread = f" ±{half_width(lengths):.3f} (95 %, {options.seeds} seeds)" if options.seeds > 1 else ""
    print(
        f"acceptance length on {first.candidate.rows} held-back rows: {before:.3f} before, {after:.3f}{spread} after "
        f"{steps} steps"
    )
    if options.results is not None:
        write_rows(options.results, _rows(options, before, lengths))
    if options.out is None:
        return 0
    if not first.passed:
        print("no better than the drafter it began with: nothing was written", file=sys.stderr)
        return 1
    print(f"the drafter is in {options.out}; serve with --drafter {options.out}")
    return 0


def _rows(options: TrainOptions, before: float, lengths: list[float]) -> Iterator[Row]:
    mean = sum(lengths) / len(lengths)
    found: dict[str, tuple[float, float | None]] = {"acceptance_length": (mean, before)}
    if len(lengths) > 1:
        found["acceptance_length_ci95"] = (half_width(lengths), None)
    for metric, (value, baseline) in found.items():
        cell = options.cell or options.log.name
        yield Row(options.experiment, cell, "online_eagle3", metric, value, baseline, command_line())


@dataclass(frozen=True)
class _Trial:
    """One training with one seed."""

    verdict: "Verdict"
    steps: int


def _trial(options: TrainOptions, source: "Log | Recorded") -> _Trial:
    """Train with one seed, judge, write what passed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory(prefix="aurora-train-") as scratch,
        Progress(*columns, console=Console(stderr=True)) as progress,
        ExitStack() as until_done,
    ):
        loop = _trainer(options, options.model or source.model, Path(scratch))
        until_done.callback(loop.close)
        _read(loop, source, progress)
        _train(loop, options.steps, progress)
        published = loop.publish()
        verdict = loop.last_verdict
        assert verdict is not None, "requests were held out"
        if published is not None and options.out is not None:
            shutil.copytree(published.path, options.out)
        return _Trial(verdict, loop.status()["step"])


class Log:
    """The traces that a server logged. Files that are damaged are named on stderr and left out."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = logged_model(directory)
        self._files = log_files(directory)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for path in self._files:
            payload = path.read_bytes()
            try:
                decode_traces(payload)
            except ValueError as error:
                print(f"{path}: left out: {error}", file=sys.stderr)
                payload = encode_traces([])
            yield str(path), payload


class Recorded:
    """The requests of a recording as traces without drafts."""

    def __init__(self, directory: Path) -> None:
        from trainer.recording import MANIFEST, Recording

        if not (directory / MANIFEST).exists():
            raise UserError(
                f"{directory}: neither traces (capture.log_dir) nor a recording; give a directory of either"
            )
        self.recording = Recording(directory)
        self.model = self.recording.manifest.model

    def __len__(self) -> int:
        return len(self.recording)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        from aurora.config import CaptureConfig
        from trainer.recording import traces_of

        rows = CaptureConfig().prompt_tokens
        for key in self.recording:
            request = self.recording.read(key)
            yield f"{self.recording.directory}, request {key}", encode_traces(list(traces_of(request, rows)))


def _trainer(options: TrainOptions, model: str, run_dir: Path) -> "TrainerLoop":
    config = _config(options, model, run_dir)
    import torch

    from aurora.default_model import model_directory, resolve_model
    from trainer.local_helpers import start_helpers
    from trainer.loop import TrainerLoop

    torch.set_num_threads(config.trainer.threads)
    device = "cuda" if config.trainer.num_gpus > 0 else "cpu"
    target_dir = model_directory(resolve_model(config.model, config.cache_dir))
    try:
        return TrainerLoop(config, target_dir, device=device, helpers=start_helpers(config.trainer, target_dir))
    except DrafterRefused as error:
        raise UserError(f"--drafter {options.drafter}: {error}") from error


def _config(options: TrainOptions, model: str, run_dir: Path) -> AuroraConfig:
    overrides: dict[str, Any] = {
        "model": model,
        "run_dir": run_dir,
        "speculation.drafter": options.drafter,
        "speculation.draft_vocab": options.draft_vocab,
        "trainer.seed": options.seed,
        "trainer.gate_sequences": _GATE_SEQUENCES,
    }
    return load_config(None, overrides | trainer_settings(options.settings))


def _read(loop: "TrainerLoop", source: "Log | Recorded", progress: Progress) -> None:
    """Hand everything to the trainer. Raises UserError when that is not enough to train on and to judge by."""
    payloads: Iterable[tuple[str, bytes]] = progress.track(source, total=len(source), description="read")
    for name, payload in payloads:
        try:
            loop.ingest(payload)
        except ValueError as error:
            raise UserError(f"{name}: {error}: the traces are not of {loop.config.model}; give --model") from error
    held = loop.status()["replay"]
    if not held["starts"] or not held["held_out"]:
        share = f"--set trainer.holdout={min(0.4, 3 * loop.config.trainer.holdout):.1f}"
        raise UserError(
            f"{held['sequences']} requests to train on and {held['held_out']} to judge by are too few: log more, or "
            f"give {share}"
        )


def _train(loop: "TrainerLoop", steps: int | None, progress: Progress) -> None:
    """`steps` optimiser steps, or `_PASSES` over the rows."""
    rows = loop.status()["replay"]["starts"]
    total = steps or max(1, _PASSES * rows // loop.config.trainer.batch_rows)
    task = progress.add_task("train", total=total)
    for _ in range(total):
        metrics = loop.train()
        description = f"train, loss {metrics.loss:.3f}, acceptance length {metrics.acceptance_length:.2f}"
        progress.update(task, advance=1, description=description)
