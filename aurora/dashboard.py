"""The W&B run of a deployment, kept by an actor of its own: it may crash, restart and lose rows without anyone waiting.

Rows go to groups, each with its own axis: `serving/*` over `time_s` (seconds since the epoch), `learning/*` over
`trainer_step`, `versions/*` over `drafter_version`; the draft model's training has `draft_model_learning/*` and
`draft_model_versions/*`. A deployment that could never log fails at start-up; a run that breaks later costs rows, which
are counted; a reporter whose run broke starts anew after a while. W&B's service writes to disk about every 15 s (0.31),
so a reporter that is killed loses that much; it comes back with a run of its own in the same W&B group.
"""

import logging
import netrc
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
import numpy as np

from aurora.config import AuroraConfig, UserError
from aurora.metrics import EngineReport, acceptance_length, merge, per_position_acceptance, tokens_per_s

log = logging.getLogger(__name__)

AXES = {
    "serving": "time_s",
    "learning": "trainer_step",
    "versions": "drafter_version",
    "draft_model_learning": "draft_model_step",
    "draft_model_versions": "draft_model_version",
}
_REOPEN_S = 60.0  # a reporter whose run broke lives that long at least: opening one takes seconds
_BROKEN = 3  # rows in a row that a run does not take before it counts as broken
_SECRET_FLAG = re.compile(r"--?[\w-]*(key|token|secret|password)", re.IGNORECASE)


class Run(Protocol):
    """What is used of a `wandb.Run`."""

    def define_metric(self, name: str, step_metric: str) -> object: ...
    def log(self, data: dict[str, Any]) -> None: ...
    def finish(self) -> None: ...


class Reporter:
    """Logs what serving and learning report. No method raises because of W&B once the run is open."""

    def __init__(self, config: AuroraConfig, run: Run | None = None) -> None:
        """Opens a W&B run unless `run` is given. Raises UserError if W&B cannot be used as configured."""
        self.dropped = 0  # rows that W&B did not take
        self._told = 0  # of them
        self._in_a_row = 0  # of them, until now
        self._opened = run is None
        self._began_s = time.monotonic()
        self._run = open_run(config) if run is None else run
        self._total = EngineReport()
        self._last_s: float | None = None
        self._heard: dict[str, EngineReport] = {}  # by replica, since the last row
        for group, axis in AXES.items():
            self._run.define_metric(f"{group}/*", step_metric=axis)

    def serving(self, report: Mapping[str, Any], time_s: float, replica: str = "") -> int:
        """Log an `EngineReport` in builtins (`msgspec.to_builtins`) that covers the time since the last one.

        Of several replicas one row tells what all of them did: it is written when one speaks again. Returns the rows of
        all groups that were dropped since the last call.
        """
        latest = msgspec.convert(report, EngineReport)
        if replica and replica not in self._heard:
            self._heard[replica] = latest
        elif replica:
            heard, self._heard = self._heard, {replica: latest}
            self._log_serving(reduce(merge, heard.values()), time_s)
        else:
            self._log_serving(latest, time_s)
        news, self._told = self.dropped - self._told, self.dropped
        return news

    def _log_serving(self, latest: EngineReport, time_s: float) -> None:
        self._total = merge(self._total, latest)
        elapsed_s = None if self._last_s is None else time_s - self._last_s
        self._last_s = time_s
        self._log("serving", time_s, serving_row(latest, self._total, elapsed_s))

    def learning(self, metrics: Mapping[str, Any], step: int, draft_model: bool = False) -> None:
        """Log the numbers among `metrics` of one optimiser step; nested mappings become `outer/inner`."""
        self._log("draft_model_learning" if draft_model else "learning", step, dict(_numbers(metrics)))

    def version(self, metadata: Mapping[str, Any], number: int, draft_model: bool = False) -> None:
        """Log what the publisher said of a version: its gate's acceptance length and the like."""
        self._log("draft_model_versions" if draft_model else "versions", number, dict(_numbers(metadata)))

    def ready(self) -> int:
        """Rows dropped so far; the first answer says that the run is open."""
        return self.dropped

    def finish(self) -> None:
        """Close the run and wait until its file is whole; call it last, it ends W&B in this process."""
        if self._heard:
            self._log_serving(reduce(merge, self._heard.values()), time.time())
        try:
            self._run.finish()
            if self._opened:
                _wait_for_file()
        except Exception as error:  # noqa: BLE001 - see _log
            self._drop(error)

    def _log(self, group: str, at: float, row: Mapping[str, Any]) -> None:
        try:
            self._run.log({AXES[group]: at, **{f"{group}/{name}": _loggable(value) for name, value in row.items()}})
            self._in_a_row = 0
        except Exception as error:  # noqa: BLE001 - W&B documents no set of errors, and none of them may end the actor
            self._drop(error)
            self._in_a_row += 1
            if self._opened and self._in_a_row >= _BROKEN and time.monotonic() - self._began_s >= _REOPEN_S:
                log.error("the W&B run is broken; the reporter starts anew with another")
                os._exit(1)  # W&B keeps its broken connection for as long as the process lives; Ray starts another

    def _drop(self, error: Exception) -> None:
        self.dropped += 1
        if self.dropped == 1:
            log.warning("W&B does not take rows (%s: %s); they are dropped and counted", type(error).__name__, error)


def serving_row(latest: EngineReport, total: EngineReport, elapsed_s: float | None) -> dict[str, Any]:
    """Rates of the latest report and running totals, without those that are unknown. Arrays are counts by index.

    elapsed_s: wall-clock seconds that `latest` covers; None if unknown.
    """
    positions = enumerate(per_position_acceptance(latest))
    row: dict[str, Any] = {
        "acceptance_length": acceptance_length(latest),
        "acceptance_length_live_version": acceptance_length(latest, latest.drafter_version),
        **{f"acceptance_at_{position}": share for position, share in positions},
        "drafter_version": latest.drafter_version,
        "tokens_per_s": None if elapsed_s is None else tokens_per_s(latest, elapsed_s),
        "goodput": tokens_per_s(latest),
        "predicted_goodput": latest.predicted_goodput or None,
        "step_time_error": latest.step_error if latest.steps else None,
        "k": np.array(latest.k_histogram) if any(latest.k_histogram) else None,
        "swap_s": latest.swap_s if latest.swaps else None,
        "swaps": total.swaps,
        "traces": total.traces,
        "trace_bytes": total.trace_bytes,
        "traces_dropped": total.traces_dropped,
        "skipped_draft_steps": total.skipped_draft_steps,
        "drift": latest.drift,
        "training_share": latest.training_share,
    }
    return {name: value for name, value in row.items() if value is not None}


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in a tree of mappings and sequences; lists of numbers are told by index."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            yield from _numbers({f"{name}_{i}": item for i, item in enumerate(value)}, prefix)
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def _loggable(value: Any) -> Any:
    """Counts by index as a W&B histogram; the rest as it is."""
    if not isinstance(value, np.ndarray):
        return value
    import wandb

    edges = np.arange(len(value) + 1) - 0.5
    return wandb.Histogram(np_histogram=(value.tolist(), edges.tolist()))


def public_config(config: AuroraConfig) -> dict[str, Any]:
    """The effective configuration as JSON values; values of vLLM flags that look like secrets are masked."""
    tree = config.model_dump(mode="json")
    tree["vllm_args"] = _masked(config.vllm_args)
    return tree


def _masked(arguments: Sequence[str]) -> list[str]:
    masked, secret = [], False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if argument.startswith("-"):
            secret = _SECRET_FLAG.fullmatch(flag.replace("_", "-")) is not None
            masked.append(f"{flag}=***" if secret and equals else argument)
        else:
            masked.append("***" if secret else argument)
    return masked


def check(config: AuroraConfig) -> None:
    """Raise UserError if W&B cannot work as configured. Loads W&B only for the online mode, and asks no server."""
    if config.reporter.mode == "disabled":
        return
    if find_spec("wandb") is None:
        raise UserError("reporter.mode: the package wandb is not installed; install it or use --wandb disabled")
    if config.reporter.mode == "online":
        import wandb

        host = urlsplit(str(wandb.setup().settings.base_url)).hostname or ""
        if not _has_key(host):
            raise UserError(
                f"--wandb online: no API key for {host}; run `wandb login`, set WANDB_API_KEY or go offline"
            )


def _has_key(host: str) -> bool:
    """Whether the environment or the user's netrc file holds credentials for a W&B server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_run(config: AuroraConfig) -> Run:
    """Open the W&B run; its files lie in `run_dir/wandb`. Raises UserError when W&B refuses."""
    check(config)
    import wandb

    config.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        run: Run = wandb.init(
            project=config.reporter.project,
            mode=config.reporter.mode,
            dir=config.run_dir,
            group=config.run_dir.resolve().name,  # a restarted reporter opens a run beside the first
            config=public_config(config),
            settings=_quiet_settings(),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--wandb {config.reporter.mode}: {reason}; check key and network or go offline") from error
    return run


def _wait_for_file() -> None:
    """`Run.finish` returns before W&B's service process has closed the run's file; `teardown` waits for it."""
    import wandb

    wandb.teardown()


def _quiet_settings() -> Any:
    """No console capture, code, git state or description of the machine leaves with the run."""
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def make_reporter_actor(config: AuroraConfig, name: str | None = None) -> Any:
    """A `Reporter` as a Ray actor that restarts whenever it dies; call its methods with `.remote()` and do not wait.

    Raises UserError if W&B cannot work as configured.
    """
    import ray

    check(config)
    config = config.model_copy(update={"run_dir": Path(config.run_dir).resolve()})
    actor = ray.remote(Reporter).options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=0)
    return actor.remote(config)
