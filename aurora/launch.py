"""`aurora serve`: joins or starts a Ray cluster, creates the actors and keeps the server running until it is told to
stop.

The Server, Trainer and Reporter actors restart by themselves; this process only starts the server's work again after
it died, and passes SIGINT and SIGTERM on.
"""

import logging
import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from aurora.config import AuroraConfig, UserError
from aurora.default_model import model_directory, resolve_model
from aurora.deployment import NAMESPACE, Deployment, cpus_wanted, ray_log_directory, ray_logs
from aurora.model_size import ModelSize
from aurora.node_roles import await_roles
from aurora.placement import as_configured, ray_nodes
from aurora.ray_access import require_token, stay_on_loopback
from aurora.replicas import supervise
from aurora.run_directory import link_logs, only_server_of
from aurora.standby import Standby
from aurora.start_notice import StartNotice
from aurora.stop_signals import StopSignals
from aurora.store import READY, DrafterRefused

log = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_RESTART_PAUSE_S = 2.0
_RAY_STARTS = 3
_CHILDREN_END_S = 10.0
_ROOT = Path(__file__).resolve().parent.parent


def serve(config: AuroraConfig) -> int:
    """Serve until interrupted; returns the exit code. Raises UserError for what the user can mend, before serving."""
    from serve.access import read_api_keys, refuse_exposure
    from serve.listen import bind

    config = config.model_copy(update={"run_dir": config.run_dir.expanduser().resolve()})
    keys = read_api_keys(config.server.api_key_file, os.environ)
    refuse_exposure(config.server, keys)
    require_token(config.server.insecure)
    bind(config.server.host, config.server.port).close()  # before the minutes that a start may take
    drafter = _first_drafter(config)
    with only_server_of(config.run_dir):
        model_dir = model_directory(resolve_model(config.model, config.cache_dir))
        if drafter is not None:
            _refuse_another_models(drafter, model_dir)
        return _serve(config, model_dir, keys)


def _serve(config: AuroraConfig, model_dir: Path, keys: list[str]) -> int:
    _start_ray(config)
    import ray

    if (logs := ray_log_directory()) is not None:
        link_logs(config.run_dir, logs)
    print(f"aurora: {config.model} starts; its processes write to {ray_logs()}", flush=True)
    try:
        if config.cluster.address is not None:
            _say_placement(config, model_dir)
        deployment = Deployment(config, model_dir, keys)
        try:
            return supervise(deployment) if config.routed else _supervise(deployment)
        finally:
            deployment.close()
    finally:
        ray.shutdown()


def _first_drafter(config: AuroraConfig) -> Path | None:
    """The `--drafter` to begin with, if it can be read here. Raises UserError for one that is none.

    A store with versions goes on with its newest, so that the same command line may start a server again.
    """
    given = config.speculation.drafter
    if given is None or not config.speculation.enabled:
        return None
    if any(config.store_dir.glob(f"v*/{READY}")):
        log.warning(
            "--drafter %s is left aside: %s has versions and goes on with the newest; to begin with this one give "
            "another --run-dir, or publish it there with `aurora drafters import`",
            given,
            config.store_dir,
        )
        return None
    if config.cluster.address is not None:
        return None  # it lies where the trainer is
    if not (given.expanduser() / "config.json").is_file():
        raise UserError(f"--drafter {given}: no config.json there; give a drafter's directory, or leave it out")
    return given.expanduser()


def _refuse_another_models(drafter: Path, model_dir: Path) -> None:
    """Raise UserError where the two directories' configurations do not belong together; tensors are read later."""
    from drafters import check_directory

    try:
        check_directory(drafter, model_dir)
    except DrafterRefused as error:
        raise UserError(f"--drafter: {error}") from error


def _say_placement(config: AuroraConfig, model_dir: Path) -> None:
    """Log where the cluster's nodes have room for the parts, or what will have to wait for another node."""
    import ray

    try:
        placement = as_configured(config, ray_nodes(ray.nodes()), ModelSize.read(model_dir))
    except UserError as error:
        log.warning("placement: %s; what finds no room waits for a node that has", error)
        return
    log.info("placement: %s; %s", placement.kind, "; ".join(placement.why))


def _supervise(deployment: Deployment) -> int:
    """Run the server; when its process died, run the restarted one. Ends with exit code 0 after a stop signal."""
    import ray

    stopping = StopSignals(deployment.server.stop.remote, partial(ray.kill, deployment.server))
    failures = 0  # in a row, without ever becoming ready
    url, standby = "", Standby("")
    while True:
        running = deployment.server.run.remote(urlsplit(url).port)
        try:
            stopping.serving = False
            found = _announce(deployment, running, stopping)
            standby.close()
            url, failures = (found, 0) if found else (url, failures + 1)
            ray.get(running)
            return 0
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            raise
        except ray.exceptions.RayActorError:
            if stopping.received:
                return 0
            if failures >= _MAX_FAILED_STARTS:
                raise UserError(f"the server died {failures} times before it was ready; see {ray_logs()}") from None
            log.warning("the server process died; it restarts with the newest published drafter")
            if deployment.config.cluster.address is None:
                standby.close()
                standby = Standby(url)
            if not _restarted(deployment, stopping):
                return 0


def _restarted(deployment: Deployment, stopping: StopSignals) -> bool:
    """Wait until Ray has started the server's process anew, which takes its time on a busy machine; False after a stop.

    Raises UserError when it does not.
    """
    import ray

    end_s = time.monotonic() + deployment.config.server.start_timeout_s
    while not stopping.wait(_RESTART_PAUSE_S):  # a server that dies at once must not be restarted in a tight loop
        with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(deployment.server.pid.remote(), timeout=_RESTART_PAUSE_S)
            return True
        if time.monotonic() > end_s:
            raise UserError(f"Ray did not start the server's process again; see {ray_logs()}")
    return False


def _announce(deployment: Deployment, running: Any, stopping: StopSignals) -> str:
    """Say where the endpoint is, once it answers, and return its URL; empty when the server ended before that."""
    import ray

    address = deployment.server.address.remote()
    ready = _first_of([address, running], deployment.config.server.start_timeout_s)
    if not ready:
        raise UserError(
            f"the server did not start within {deployment.config.server.start_timeout_s:.0f} s; "
            f"see {ray_logs()}, or raise server.start_timeout_s"
        )
    if running in ready:
        return ""
    try:
        url: str = ray.get(address)
    except ray.exceptions.RayActorError:
        return ""
    stopping.serving = True
    print(f"aurora: {deployment.config.model} answers at {url}/v1", flush=True)
    return url


def _first_of(awaited: list[Any], limit_s: float) -> list[Any]:
    """What of it is there first; nothing after `limit_s`. Says meanwhile that the start goes on."""
    import ray

    notice = StartNotice()
    while (rest_s := limit_s - notice.elapsed_s) > 0:
        ready: list[Any] = ray.wait(awaited, num_returns=1, timeout=min(notice.rest_s, rest_s))[0]
        if ready:
            return ready
        notice.look()
    return []


def _start_ray(config: AuroraConfig) -> None:
    if config.cluster.address is None:
        stay_on_loopback()
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 is nearly the trainer's 19
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    if config.cluster.address is not None:
        try:
            ray.init(address=config.cluster.address, runtime_env=environment, namespace=NAMESPACE)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"--address {config.cluster.address}: no Ray cluster answers there ({error}); start one with "
                "`aurora up ray_cluster.yaml`, or leave --address out"
            ) from error
        roles = ("serve", "train") if config.learning else ("serve",)
        await_roles(roles, ray.cluster_resources, config.cluster.wait_s)
        return
    cpus = max(os.cpu_count() or 1, cpus_wanted(config))
    others = _children()
    for tried in range(1, _RAY_STARTS + 1):
        try:
            ray.init(
                "local",  # whatever RAY_ADDRESS says, or `ray start` has left here
                num_cpus=cpus,
                include_dashboard=False,
                runtime_env=environment,
                namespace=NAMESPACE,
                log_to_driver=False,
            )
            return
        except Exception as error:
            if type(error) is not Exception:  # Ray raises the bare class, and only that, where its processes are late
                raise
            ray.shutdown()
            _end(_children() - others)  # what it had started would make the next one late, too
            log.warning("Ray did not start (%s), try %d of %d", error, tried, _RAY_STARTS)
    raise UserError("Ray did not start; see /tmp/ray/session_latest/logs, or end what keeps this machine busy")


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_CHILDREN_END_S)
