"""The Trainer actor: `TrainerLoop` in a process of its own, at low priority. With several workers it is their leader.

`ingest` and `status` are answered while a step computes. If training fails the process ends, so that Ray starts it anew
and it resumes from its checkpoint: a trainer that answers but no longer learns never exists.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch

from aurora.config import AuroraConfig, TrainerConfig, UserError
from drafters.target import TargetWeights
from trainer.budget import Load, Loads
from trainer.loop import TrainerLoop
from trainer.member import Member
from trainer.parallel import use_interface
from trainer.priority import yield_to_others
from trainer.shares import Share
from trainer.sinks import Sinks

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 60


class Trainer:
    """The actor's class. `reporter` names an actor with `learning` and `version`; it may die. None: nobody is told."""

    def __init__(
        self,
        config: AuroraConfig,
        target_dir: str,
        reporter: str | None = None,
        resources: dict[str, float] | None = None,
    ) -> None:
        device = _begin(config.trainer)
        sinks, model_sinks = _sinks(reporter)
        self._loads = Loads()
        self._loop = TrainerLoop(
            config,
            Path(target_dir),
            sinks,
            device=device,
            model_sinks=model_sinks,
            helpers=_make_helpers(config.trainer, target_dir, resources or {}),
            address=ray.util.get_node_ip_address(),
        )
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


class TrainerHelper(Member):
    """The actor's class of a further worker. It ends with the Trainer that created it."""

    def __init__(self, settings: TrainerConfig, target_dir: str) -> None:
        device = _begin(settings)
        use_interface(ray.util.get_node_ip_address())
        super().__init__(settings, TargetWeights.load(Path(target_dir), device), device)

    def step(self, share: Share, oldest_version: int, copy: bool) -> bool:
        """As `Member.step`; if it fails the process ends, so that Ray starts it anew."""
        try:
            return super().step(share, oldest_version, copy)
        except BaseException:
            log.exception("a training worker failed; Ray restarts it and it joins again")
            logging.shutdown()
            os._exit(1)


class ActorHelper:
    """A `TrainerHelper` as the leader sees it (`trainer.crew.Helper`)."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def submit(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = getattr(self.actor, method).remote(*args).future()
        return future

    def close(self) -> None:
        """End the process."""
        ray.kill(self.actor)


def _make_helpers(settings: TrainerConfig, target_dir: str, resources: dict[str, float]) -> Sequence[ActorHelper]:
    """One actor for each worker but the first. Ray restarts them without limit."""
    made = ray.remote(TrainerHelper).options(
        num_cpus=settings.threads, num_gpus=settings.num_gpus, resources=resources, max_restarts=-1
    )
    return [ActorHelper(made.remote(settings, target_dir)) for _ in range(settings.workers - 1)]


def _begin(settings: TrainerConfig) -> str:
    """Set this process up to train; returns the device."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s trainer %(levelname)s %(message)s")
    yield_to_others(settings.nice)
    torch.set_num_threads(settings.threads)
    return "cuda" if settings.num_gpus > 0 else "cpu"


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
    place: dict[str, float] | None = None,
    taken: dict[str, float] | None = None,
) -> Any:
    """Create the actor; returns its handle at once. Ray restarts it without limit.

    resources: of each worker. place: what else the leader takes, which only the machine with its files has. taken: by
    others, of the cluster's resources. Raises UserError when the rest has no room for all workers.
    """
    if config.trainer.workers > 1:
        _check_room(config.trainer, resources or {}, taken or {})
    actor = ray.remote(Trainer).options(
        name=name,
        num_cpus=config.trainer.threads,
        num_gpus=config.trainer.num_gpus,
        resources={**(resources or {}), **(place or {})},
        max_restarts=-1,
        max_concurrency=8,
    )
    return actor.remote(config, str(target_dir), reporter, resources)


def _check_room(settings: TrainerConfig, resources: dict[str, float], taken: dict[str, float]) -> None:
    """Raise UserError when the workers need more of something than the cluster has besides what is taken."""
    there = ray.cluster_resources()
    needed = {"CPU": float(settings.threads), "GPU": settings.num_gpus, **resources}
    left = {name: there.get(name, 0.0) - taken.get(name, 0.0) for name in needed}
    room = {name: int(left[name] // each) for name, each in needed.items() if each > 0}
    scarce = min(room, key=lambda name: room[name])
    if room[scarce] < settings.workers:
        raise UserError(
            f"trainer.workers {settings.workers}: each takes {needed[scarce]:g} {scarce} and the cluster has "
            f"{left[scarce]:g} left for them; give at most {max(room[scarce], 1)}, or start more nodes"
        )
