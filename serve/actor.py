"""The Server actor: one vLLM engine, its HTTP endpoint and the feedback loops, in one Ray actor process."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from prometheus_client import REGISTRY

from aurora.alarms import KINDS, SpeculationAlarms
from aurora.config import AuroraConfig
from aurora.guard import VersionGuard
from aurora.metrics import EngineReport
from aurora.store_offers import Source
from aurora.trace_log import TraceLog
from serve.admission import Admission
from serve.calibration import calibrate
from serve.canary import Canary, RouterGone
from serve.cores import claim_cores
from serve.engine import RunningEngine, install_seams, start_engine
from serve.exporter import PrometheusExporter
from serve.feedback import (
    Ingest,
    Observer,
    Report,
    TraceForwarder,
    TrainerUnavailable,
    collect_forever,
    expire_forever,
    swap_forever,
)
from serve.health import end_with_engine
from serve.history import History
from serve.http import serve_http
from serve.listen import bind, split_tls, tls_of, url_of
from serve.load import Hear, LoadTeller, tell_forever
from serve.mirror import RemoteSource, ServedStores
from serve.vitals import Vitals

log = logging.getLogger(__name__)

_BACKLOG = 2048
_HAND_ON_S = 20.0  # that the last traces may take at a stop


@dataclass(frozen=True)
class Peers:
    """Names of the actors that a Server talks to, all of which may die; None for those that there are not."""

    trainer: str | None = None
    reporter: str | None = None
    source: str | None = None  # hands out the trainer's drafters where the nodes share no file system
    router: str | None = None
    replica: str = ""  # its own name among several servers


class Server:
    """Serves until told to stop. Restarted by Ray, it comes back with the newest verified drafter version.

    keys: any of them lets a request in; none: all come in. Behind a Router it listens where that one finds it.
    """

    def __init__(self, config: AuroraConfig, model_dir: Path, keys: Sequence[str], peers: Peers) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("serve").setLevel(logging.INFO)  # whatever the libraries do to the root logger
        config = config if peers.router is None else _as_replica(config, peers.replica)
        source = partial(_source, peers.source) if peers.source is not None else None
        self._stores = ServedStores(config, source, peers.replica or "0")
        self.config = self._stores.config
        self.model_dir = model_dir
        self._keys = keys
        self._replica = peers.replica
        self._canary = None if peers.router is None else Canary(_RouterHandle(peers.router), peers.replica)
        self.trainer = _find(peers.trainer)
        self.reporter = _find(peers.reporter)
        self._http: Any = None
        self._admission = Admission(0)
        self._history = History(REGISTRY, {"eagle3": self.config.store_dir, "model": self.config.draft_model_dir})
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._collecting: asyncio.Task[None] | None = None
        self._url = ""

    async def run(self, port: int | None = None) -> None:
        """Start and serve; returns after `stop`. Raises UserError for what the user can mend.

        port: where it was before a restart; None: as configured.
        """
        server = self.config.server
        sock = bind(server.host, port or server.port, shared=port is not None)  # the launcher may stand in for us there
        await self._stores.begin(server.start_timeout_s)
        newest = await self._canary.newest(self._stores.all()) if self._canary is not None else {}
        cores = claim_cores(server.num_cpus) if self.config.cluster.address is not None else None
        engine = start_engine(self.config, self.model_dir, newest)
        self._admission = Admission(_places(engine, self.config))
        self._admission.engine_died = lambda: engine.client.errored
        loops = await self._start_loops(engine)
        self._http = await serve_http(engine, self.config, sock, self._keys, self._admission, history=self._history)
        self._url = url_of(sock, tls=bool(tls_of(engine.args)))
        sock.listen(_BACKLOG)  # from here on a connection waits instead of being refused
        self._ready.set()
        loops.append(asyncio.create_task(end_with_engine(engine, self.config.server.hang_s)))
        try:
            await self._http.serve(sockets=[sock])
            await self._hand_on()
        finally:
            for loop in loops:
                loop.cancel()
            engine.client.shutdown()
            if cores is not None:
                cores.release()

    async def _hand_on(self) -> None:
        """Let the trainer and the log have what was captured last."""
        self._ended.set()
        if self._collecting is not None:
            done, _ = await asyncio.wait([self._collecting], timeout=_HAND_ON_S)
            if not done:
                log.warning("the last traces were not handed on within %g s", _HAND_ON_S)

    async def address(self) -> str:
        """The URL of the endpoint, once requests are answered."""
        await self._ready.wait()
        return self._url

    async def places(self) -> int:
        """Requests that may be open here at once."""
        return self._admission.places

    async def stop(self) -> None:
        """Refuse new requests, let open ones finish for `server.drain_s`, and end `run`."""
        if self._http is not None:
            late = await self._admission.drain(self.config.server.drain_s)
            if late:
                log.warning("%d requests were cut off after %g s (server.drain_s)", late, self.config.server.drain_s)
            self._http.should_exit = True

    async def pid(self) -> int:
        return os.getpid()

    async def _start_loops(self, engine: RunningEngine) -> list["asyncio.Task[None]"]:
        if engine.drafter is None:
            return []
        await install_seams(engine, self.config)
        if engine.uncalibrated:
            await calibrate(engine)
        exporter = PrometheusExporter(REGISTRY)
        self._admission.on_refused = partial(exporter.inc, "aurora_requests_refused_total", {})
        self._admission.on_answer = lambda status: exporter.inc("aurora_responses_total", {"code": status})
        ingest = _ingest_into(self.trainer) if self.trainer is not None else None
        trace_log = _trace_log(self.config)
        exporter.set("aurora_learning", int(self.trainer is not None))
        forwarder = TraceForwarder(ingest, exporter, trace_log, self.config.capture.sink_mib << 20)
        hear = _heard_by(self.trainer, self._replica) if self.trainer is not None else None
        teller = LoadTeller(engine.drafter.number, hear, exporter)
        report_to = _report_to(self.reporter, exporter, self._replica) if self.reporter is not None else None
        if report_to is not None:
            report_to = teller.completed(Vitals(REGISTRY).completed(report_to))
        guard = VersionGuard(engine.drafter.number)
        observers: list[Observer] = [exporter.update, guard.observe, teller.observe, self._history.observe]
        if _explores(self.config):
            observers.append(partial(_sound, SpeculationAlarms(), exporter))
        permit = self._canary.permit if self._canary is not None else None
        if self._canary is not None:
            observers.append(self._canary.observer("eagle3", lambda: guard.live, sign=1))
        loops = [
            swap_forever(engine, self._stores.store(), exporter, guard, permit=permit),
            tell_forever(engine, teller, self.config.capture.interval_s),
        ]
        live = {"eagle3": lambda: guard.live}
        if engine.draft_model is not None:
            second = VersionGuard(engine.draft_model.number, sign=-1)
            exporter.set("aurora_draft_model_version", second.live)
            observers.append(second.observe)
            if self._canary is not None:
                observers.append(self._canary.observer("model", lambda: second.live, sign=-1))
            loops.append(
                swap_forever(engine, self._stores.store("model"), exporter, second, kind="model", permit=permit)
            )
            live["model"] = lambda: second.live
        loops += self._stores.loops(exporter, live)
        if trace_log is not None:
            loops.append(expire_forever(trace_log))
        collecting = collect_forever(engine, self.config, forwarder, observers, report_to, ended=self._ended)
        self._collecting = asyncio.create_task(_or_exit(collecting))
        return [self._collecting, *(asyncio.create_task(_or_exit(loop)) for loop in loops)]


def _as_replica(config: AuroraConfig, replica: str) -> AuroraConfig:
    """The configuration of one of several servers: it listens for the Router, and its files are its own."""
    host = "127.0.0.1" if config.cluster.address is None else ray.util.get_node_ip_address()
    server = config.server.model_copy(update={"host": host, "port": 0})
    log_dir, step_log = config.capture.log_dir, config.speculation.step_log
    capture = config.capture.model_copy(update={"log_dir": log_dir and log_dir / replica})
    own = step_log and step_log.with_name(f"{step_log.stem}-{replica}{step_log.suffix}")
    speculation = config.speculation.model_copy(update={"step_log": own})
    _, flags = split_tls(config.vllm_args)
    update = {"server": server, "capture": capture, "speculation": speculation, "vllm_args": flags}
    return config.model_copy(update=update)


class _RouterHandle:
    """The Router actor of a name, found anew after it died."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def allowed(self, kind: str, replica: str, live: int, latest: int) -> tuple[int, str]:
        newest, refused = await self._ask("allowed", kind, replica, live, latest)
        return newest, refused

    async def observe(self, kind: str, live: int, first_drafts: Mapping[int, tuple[int, int]]) -> None:
        await self._ask("observe", kind, live, first_drafts)

    async def _ask(self, method: str, *arguments: object) -> Any:
        try:
            return await getattr(ray.get_actor(self._name), method).remote(*arguments)
        except (ValueError, ray.exceptions.RayError) as error:
            raise RouterGone(str(error)) from error


def _find(name: str | None) -> Any:
    """The actor of this name; None, with a warning, when it is gone for good."""
    try:
        return ray.get_actor(name) if name is not None else None
    except ValueError:
        log.warning("no actor %s; serving goes on without it", name)
        return None


def _source(name: str, kind: str) -> Source:
    """The trainer's store of a kind of drafter, by the name of the actor that hands it out."""
    return RemoteSource(partial(ray.get_actor, name), kind, (ray.exceptions.RayError, ValueError))


def _trace_log(config: AuroraConfig) -> TraceLog | None:
    """Where traces are kept, if they are. Raises UserError when that directory cannot be used."""
    capture = config.capture
    return (
        TraceLog(capture.log_dir.expanduser(), capture.log_mib << 20, config.model, _seconds(capture.log_days))
        if capture.log_dir is not None
        else None
    )


def _seconds(days: float | None) -> float | None:
    return None if days is None else days * 86400


def _ingest_into(trainer: Any) -> Ingest:
    """Hands payloads to the Trainer actor."""

    async def ingest(payload: bytes) -> None:
        try:
            await trainer.ingest.remote(payload)
        except ray.exceptions.RayError as error:
            raise TrainerUnavailable(type(error).__name__) from error

    return ingest


def _heard_by(trainer: Any, replica: str) -> Hear:
    """Tells the Trainer actor how the server is."""

    async def hear(busy: bool, drift: bool) -> tuple[float, str]:
        try:
            share, unsaved = await trainer.hear.remote(busy, drift, replica)
        except ray.exceptions.RayError as error:
            raise TrainerUnavailable(type(error).__name__) from error
        return share, unsaved

    return hear


def _report_to(reporter: Any, exporter: PrometheusExporter, replica: str) -> Report:
    """Hands counters to the Reporter actor and does not wait; a dead one loses them and nothing else."""
    waiting: set[asyncio.Task[None]] = set()

    async def send(counters: dict[str, Any], time_s: float) -> None:
        try:
            dropped = await reporter.serving.remote(counters, time_s, replica)
        except ray.exceptions.RayError as error:
            log.debug("the reporter is gone: %s", error)
            dropped = 1
        exporter.inc("aurora_report_rows_dropped_total", {}, dropped)

    def report(counters: dict[str, Any], time_s: float) -> None:
        task = asyncio.create_task(send(counters, time_s))
        waiting.add(task)
        task.add_done_callback(waiting.discard)

    return report


async def _or_exit(loop: Any) -> None:
    """Run a loop for ever; its failure ends the process, so that Ray restarts a whole server, never half of one."""
    try:
        await loop
    except asyncio.CancelledError:
        raise
    except BaseException:
        log.exception("a feedback loop failed; the server restarts")
        os._exit(1)


def _explores(config: AuroraConfig) -> bool:
    """Whether the neural drafter drafts now and then whatever the rule says."""
    speculation = config.speculation
    return "eagle3" in speculation.drafters and speculation.fixed_k != 0 and speculation.exploration > 0


def _sound(alarms: SpeculationAlarms, exporter: PrometheusExporter, report: EngineReport) -> None:
    """Show and log alarms that a report raises or ends."""
    before = dict(alarms.raised)
    alarms.observe(report)
    for kind in KINDS:
        exporter.set("aurora_alarm", int(kind in alarms.raised), kind=kind)
        if kind in alarms.raised and kind not in before:
            log.error("alarm %s: %s; see docs/reliability.md", kind, alarms.raised[kind])
        elif kind in before and kind not in alarms.raised:
            log.warning("alarm %s is over", kind)


def _places(engine: RunningEngine, config: AuroraConfig) -> int:
    """Requests that may be open."""
    running: int = engine.client.vllm_config.scheduler_config.max_num_seqs
    return running + (running if config.limits.waiting is None else config.limits.waiting)


def make_server_actor(
    config: AuroraConfig,
    model_dir: Path,
    keys: Sequence[str],
    peers: Peers,
    *,
    environment: dict[str, str],
    resources: dict[str, float],
) -> Any:
    """Create the actor; `environment` must hold what vLLM's CPU start-up needs before the process begins."""
    actor = ray.remote(Server).options(
        num_cpus=config.server.num_cpus or 1,
        num_gpus=config.server.num_gpus,
        resources=resources,
        max_restarts=-1,
        max_concurrency=64,
        runtime_env={"env_vars": environment},
    )
    return actor.remote(config, model_dir, keys, peers)
