"""The W&B run of a deployment, kept by an actor of its own: it may crash, restart and lose rows without anyone waiting.

Rows go to groups, each with its own axis (`aurora.rows`). `reporter.sink` may name another sink than W&B
(`aurora.sinks`); this is the only module that imports wandb. A deployment that could never log fails at start-up; a run
that breaks later costs rows, which are counted; a reporter whose run broke starts anew after a while. W&B's service
writes to disk about every 15 s (0.31), so a reporter that is killed loses that much; it comes back with a run of its
own in the same W&B group.
"""

import json
import logging
import netrc
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from aurora.alerts import Alert, AlertRules
from aurora.config import AuroraConfig, UserError
from aurora.metrics import EngineReport, merge
from aurora.rows import AXES, DRAFT_COLUMNS, numbers, serving_row
from aurora.sinks import Drafter, JsonlSink, Sink, Table, TensorBoardSink, check_tensorboard
from aurora.store import DrafterRefused, DrafterStore

log = logging.getLogger(__name__)

_REOPEN_S = 60.0  # a reporter whose run broke lives that long at least: opening one takes seconds
_BROKEN = 3  # rows in a row that a run does not take before it counts as broken
_SECRET_FLAG = re.compile(r"--?[\w-]*(key|token|secret|password)", re.IGNORECASE)


class Reporter:
    """Logs what serving and learning report. No method raises because of the sink once it is open."""

    def __init__(self, config: AuroraConfig, sink: Sink | None = None) -> None:
        """Opens the sink that is configured unless `sink` is given. Raises UserError if it cannot be used."""
        self.dropped = 0  # rows that the sink did not take
        self._failed = False  # whether it ever did not take something
        self._told = 0  # of them
        self._in_a_row = 0  # of them, until now
        self._reopens = sink is None and config.reporter.sink == "wandb"
        self._began_s = time.monotonic()
        self._sink = open_sink(config) if sink is None else sink
        self._total = EngineReport()
        self._last_s: float | None = None
        self._heard: dict[str, EngineReport] = {}  # by replica, since the last row
        self._alerts = AlertRules(config.reporter.alert_s)
        self._stores = {"drafter": config.store_dir, "draft_model": config.draft_model_dir}
        for group, axis in AXES.items():
            self._sink.define(group, axis)

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
            self._log_serving(_of_all(heard), time_s)
        else:
            self._log_serving(latest, time_s)
        news, self._told = self.dropped - self._told, self.dropped
        return news

    def _log_serving(self, latest: EngineReport, time_s: float) -> None:
        self._total = merge(self._total, latest)
        elapsed_s = None if self._last_s is None else time_s - self._last_s
        self._last_s = time_s
        self._log("serving", time_s, serving_row(latest, self._total, elapsed_s) | {"rows_dropped": self.dropped})
        for alert in self._alerts.observe(latest, self.dropped - self._told, time.monotonic()):
            self._try(partial(self._sink.alert, alert))

    def learning(self, metrics: Mapping[str, Any], step: int, draft_model: bool = False) -> None:
        """Log the numbers among `metrics` of one optimiser step; nested mappings become `outer/inner`."""
        self._log("draft_model_learning" if draft_model else "learning", step, dict(numbers(metrics)))

    def drafts(self, rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log verified drafts as text, one a row of `DRAFT_COLUMNS`; the trainer sends them if it was told to."""
        self._log("learning", step, {"drafts": Table(DRAFT_COLUMNS, rows)})

    def version(self, metadata: Mapping[str, Any], number: int, draft_model: bool = False) -> None:
        """Log what the publisher said of a version, its gate's acceptance length and the like, and the version."""
        self._log("draft_model_versions" if draft_model else "versions", number, dict(numbers(metadata)))
        kind = "draft_model" if draft_model else "drafter"
        self._try(lambda: self._sink.drafter(_published(self._stores[kind], kind, number, metadata)))

    def ready(self) -> int:
        """Rows dropped so far; the first answer says that the sink is open."""
        return self.dropped

    def finish(self) -> None:
        """Close the sink and wait until its file is whole; call it last, it ends W&B in this process."""
        if self._heard:
            self._log_serving(_of_all(self._heard), time.time())
        if not self._try(self._sink.finish):
            self.dropped += 1

    def _log(self, group: str, at: float, row: Mapping[str, Any]) -> None:
        values = {f"{group}/{name}": value for name, value in row.items()}
        if self._try(partial(self._sink.log, AXES[group], at, values)):
            self._in_a_row = 0
            return
        self.dropped += 1
        self._in_a_row += 1
        if self._reopens and self._in_a_row >= _BROKEN and time.monotonic() - self._began_s >= _REOPEN_S:
            log.error("the W&B run is broken; the reporter starts anew with another")
            os._exit(1)  # W&B keeps its broken connection for as long as the process lives; Ray starts another

    def _try(self, write: Callable[[], object]) -> bool:
        """Whether the sink took it. The first time that it does not is logged."""
        try:
            write()
        except Exception as error:  # noqa: BLE001 - W&B documents no set of errors, and none of them may end the actor
            if not self._failed:
                name = type(error).__name__
                log.warning(
                    "the reporter's sink does not take rows (%s: %s); they are dropped and counted", name, error
                )
            self._failed = True
            return False
        return True


def _of_all(heard: Mapping[str, EngineReport]) -> EngineReport:
    """One report for what several replicas did at the same time; a condition of one of them holds for all."""
    reports = heard.values()
    alarms = sorted({kind for report in reports for kind in report.alarms})
    whole = reduce(merge, reports)
    return msgspec.structs.replace(whole, alarms=alarms, drift=max(report.drift for report in reports))


def _published(store: Path, kind: str, number: int, metadata: Mapping[str, Any]) -> Drafter:
    """A version as a sink is told of it; one that cannot be read from this machine has no files."""
    try:
        version = DrafterStore(store).read(number)
    except (DrafterRefused, OSError):
        return Drafter(kind, number, metadata, None)
    return Drafter(kind, number, {**metadata, "sha256": version.digests}, version.path)


def open_sink(config: AuroraConfig) -> Sink:
    """Open what `reporter.sink` names. Raises UserError when it cannot be used."""
    if config.reporter.sink == "wandb" or config.reporter.mode == "disabled":
        return WandbSink(config)
    opened = TensorBoardSink if config.reporter.sink == "tensorboard" else JsonlSink
    try:
        return opened(config, public_config(config))
    except OSError as error:
        raise UserError(
            f"--run-dir {config.run_dir}: {error.strerror}; give a directory that can be written"
        ) from error


class WandbSink:
    """A W&B run."""

    def __init__(self, config: AuroraConfig) -> None:
        """Opens the run. Raises UserError when W&B refuses."""
        self._run = open_run(config)
        self._files = config.reporter.artifacts
        self._collection = re.sub(r"[^\w.-]", "-", config.run_dir.resolve().name)
        self._alert_s = config.reporter.alert_s

    def define(self, group: str, axis: str) -> None:
        self._run.define_metric(f"{group}/*", step_metric=axis)

    def log(self, axis: str, at: float, values: Mapping[str, Any]) -> None:
        self._run.log({axis: at, **{name: _loggable(value) for name, value in values.items()}})

    def drafter(self, drafter: Drafter) -> None:
        """An artifact whose versions are the drafter's; the parent is named in its metadata, as it is offline, too."""
        if self._files == "off":
            return
        import wandb

        metadata = {**drafter.metadata, "number": drafter.number}
        artifact = wandb.Artifact(f"{drafter.kind}-{self._collection}", type=drafter.kind, metadata=metadata)
        with artifact.new_file("version.json") as file:  # makes it another version than one with the same files
            file.write(json.dumps(metadata, indent=1))
        if drafter.directory is not None and self._files == "files":
            artifact.add_dir(str(drafter.directory))
        elif drafter.directory is not None:
            artifact.add_reference(drafter.directory.resolve().as_uri())
        self._run.log_artifact(artifact, aliases=["latest", f"version-{drafter.number}"])

    def alert(self, alert: Alert) -> None:
        level = "ERROR" if alert.error else "WARN"
        self._run.alert(f"aurora: {alert.kind}", alert.text, level=level, wait_duration=self._alert_s)

    def finish(self) -> None:
        """`Run.finish` returns before W&B's service process has closed the run's file; `teardown` waits for it."""
        import wandb

        self._run.finish()
        wandb.teardown()


def _loggable(value: Any) -> Any:
    """Counts by index as a W&B histogram, tables as W&B's; the rest as it is."""
    if isinstance(value, Table):
        import wandb

        return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
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
    """Raise UserError if the sink cannot work as configured. Loads W&B only for its online mode, and asks no server."""
    if config.reporter.mode == "disabled" or config.reporter.sink == "jsonl":
        return
    if config.reporter.sink == "tensorboard":
        check_tensorboard()
        return
    if find_spec("wandb") is None:
        raise UserError("reporter.mode: the package wandb is not installed; install it or use --wandb disabled")
    if config.reporter.mode == "online":
        _require_key("--wandb online", "go offline")


def _require_key(what: str, instead: str) -> None:
    """Raise UserError without a key for the W&B server that is set."""
    import wandb

    host = urlsplit(str(wandb.setup().settings.base_url)).hostname or ""
    if not _has_key(host):
        raise UserError(f"{what}: no API key for {host}; run `wandb login`, set WANDB_API_KEY or {instead}")


@contextmanager
def asking_wandb(what: str, instead: str) -> Iterator[Any]:
    """Gives W&B's public API; what goes wrong with it inside becomes a UserError of `what`, beside a remedy."""
    _require_key(what, instead)
    import wandb

    try:
        yield wandb.Api()
    except (wandb.errors.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: {reason}; check key, entity, project and network, or {instead}") from error


def _has_key(host: str) -> bool:
    """Whether the environment or the user's netrc file holds credentials for a W&B server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_run(config: AuroraConfig) -> Any:
    """Open the W&B run; its files lie in `run_dir/wandb`. Raises UserError when W&B refuses."""
    check(config)
    import wandb

    config.run_dir.mkdir(parents=True, exist_ok=True)
    # What artifacts hold waits there until it is uploaded, which may be long after: not in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", str(config.run_dir.resolve() / "wandb" / "data"))
    try:
        return wandb.init(
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

    Raises UserError if the sink cannot work as configured.
    """
    import ray

    check(config)
    config = config.model_copy(update={"run_dir": Path(config.run_dir).resolve()})
    actor = ray.remote(Reporter).options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=0)
    return actor.remote(config)
