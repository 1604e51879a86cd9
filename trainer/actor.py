"""The Trainer actor: `TrainerLoop` in a process of its own, at low priority.

`ingest` and `status` are answered while a step computes. If training fails the process ends, so that Ray starts it anew
and it resumes from its checkpoint: a trainer that answers but no longer learns never exists.
"""

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import ray
import torch

from aurora.config import AuroraConfig
from trainer.budget import Load, Loads
from trainer.loop import TrainerLoop
from trainer.sinks import Sinks

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 60
_LOWEST_PRIORITY = 19


class Trainer:
    """The actor's class. `reporter` names an actor with `learning` and `version`; it may die. None: nobody is told."""

    def __init__(self, config: AuroraConfig, target_dir: str, reporter: str | None = None) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s trainer %(levelname)s %(message)s")
        _yield_to_others(config.trainer.nice)
        torch.set_num_threads(config.trainer.threads)
        device = "cuda" if config.trainer.num_gpus > 0 else "cpu"
        sinks, model_sinks = _sinks(reporter)
        self._loads = Loads()
        self._loop = TrainerLoop(config, Path(target_dir), sinks, device=device, model_sinks=model_sinks)
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._thread.start()

    def _train(self) -> None:
        try:
            self._loop.run()
        except BaseException:
            log.exception("training failed; the process ends and Ray restarts it from the checkpoint")
            logging.shutdown()
            os._exit(1)

    def ingest(self, payload: bytes) -> int:
        """Take the traces of one payload (`aurora.trace.encode_traces`); returns their number."""
        return self._loop.ingest(payload)

    def hear(self, busy: bool, drift: bool, replica: str = "") -> tuple[float, str]:
        """A server says whether requests are open and traffic drifts; of several, any of them counts.

        Returns the share of time computed of late, and why the disk did not take what was written last ("": it did).
        """
        return self._loop.hear(self._loads.told(replica, Load(busy, drift), time.monotonic())), self._loop.unsaved

    def status(self) -> dict[str, Any]:
        """Where training stands (`TrainerLoop.status`)."""
        return {**self._loop.status(), "pid": os.getpid()}

    def stop(self) -> None:
        """End training with a checkpoint."""
        self._loop.stop()
        self._thread.join(_STOP_TIMEOUT_S)


def _yield_to_others(nice: int) -> None:
    """Lower the priority of this thread and those it starts; at nice 19 they run only on idle cores (Linux)."""
    os.nice(nice)
    if nice == _LOWEST_PRIORITY and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _sinks(name: str | None) -> tuple[Sinks, Sinks]:
    """Of the neural drafter and of the draft model. Fire and forget: a dead reporter loses metrics and nothing else."""
    try:
        reporter = ray.get_actor(name) if name is not None else None
    except ValueError:  # Ray knows no living actor of this name
        log.warning("the reporter %s is gone; training goes on unreported", name)
        reporter = None
    if reporter is None:
        return Sinks(), Sinks()
    return _tell_of(reporter), _tell_of(reporter, draft_model=True)


def _tell_of(reporter: Any, **which: bool) -> Sinks:
    return Sinks(
        learning=lambda metrics, step: _tell(reporter.learning, metrics, step, **which),
        version=lambda metadata, number: _tell(reporter.version, metadata, number, **which),
        drafts=lambda rows, step: _tell(reporter.drafts, rows, step),
    )


def _tell(method: Any, values: dict[str, Any] | list[list[Any]], number: int, **which: bool) -> None:
    try:
        method.remote(values, number, **which)
    except ray.exceptions.RayError as error:
        log.debug("reporter is gone: %s", error)


def make_trainer_actor(
    config: AuroraConfig,
    target_dir: Path,
    name: str | None = None,
    reporter: str | None = None,
    *,
    resources: dict[str, float] | None = None,
    placement: Any = None,
) -> Any:
    """Create the actor; returns its handle at once. Ray restarts it without limit, and by `placement` (a Ray scheduling
    strategy) where its files are."""
    actor = ray.remote(Trainer).options(
        name=name,
        num_cpus=config.trainer.threads,
        num_gpus=config.trainer.num_gpus,
        resources=resources or {},
        scheduling_strategy=placement,
        max_restarts=-1,
        max_concurrency=8,
    )
    return actor.remote(config, str(target_dir), reporter)
