"""`aurora serve`: joins or starts a Ray cluster, creates the actors and keeps the server running until it is told to
stop.

The Server, Trainer and Reporter actors restart by themselves; this process only starts the server's work again after
it died, and passes SIGINT and SIGTERM on.
"""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from aurora.config import AuroraConfig, UserError
from aurora.default_model import model_directory, resolve_model
from aurora.environment import engine_environment
from aurora.ray_access import require_token, stay_on_loopback
from aurora.standby import Standby

log = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_RESTART_PAUSE_S = 2.0
_CLOSE_TIMEOUT_S = 60.0
_RAY_STARTS = 3
_ROOT = Path(__file__).resolve().parent.parent


def serve(config: AuroraConfig) -> int:
    """Serve until interrupted; returns the exit code. Raises UserError for what the user can mend, before serving."""
    from serve.access import read_api_keys, refuse_exposure

    config = config.model_copy(update={"run_dir": config.run_dir.expanduser().resolve()})
    keys = read_api_keys(config.server.api_key_file, os.environ)
    refuse_exposure(config.server, keys)
    require_token(config.server.insecure)
    model_dir = model_directory(resolve_model(config.model, config.cache_dir))
    _make_run_dir(config.run_dir)
    _start_ray(config)
    import ray

    try:
        deployment = Deployment(config, model_dir, keys)
        try:
            return _supervise(deployment)
        finally:
            deployment.close()
    finally:
        ray.shutdown()


class Deployment:
    """The actors of one `aurora serve`. They know each other by name, so that a restarted one finds the others."""

    def __init__(self, config: AuroraConfig, model_dir: Path, keys: Sequence[str]) -> None:
        self.config = config
        self._id = uuid.uuid4().hex[:8]
        self.reporter = self._make_reporter()
        self.trainer = self._make_trainer(model_dir) if config.learning else None
        from serve.actor import make_server_actor

        self.server = make_server_actor(
            config,
            model_dir,
            keys,
            trainer=self._name("trainer") if self.trainer is not None else None,
            reporter=self._name("reporter") if self.reporter is not None else None,
            environment=engine_environment() | _server_environment(config),
            resources=_role("serve"),
        )

    def _make_reporter(self) -> Any | None:
        if self.config.reporter.mode == "disabled":
            return None
        from aurora.dashboard import make_reporter_actor

        return make_reporter_actor(self.config, self._name("reporter"))

    def _make_trainer(self, model_dir: Path) -> Any:
        from trainer.actor import make_trainer_actor

        reporter = self._name("reporter") if self.reporter is not None else None
        role, server = _role("train"), self.config.server  # nodes with a role are the trainers' own
        taken = {} if role else {"CPU": server.num_cpus or 1.0, "GPU": server.num_gpus}
        return make_trainer_actor(self.config, model_dir, self._name("trainer"), reporter, resources=role, taken=taken)

    def close(self) -> None:
        """Let the trainer write its checkpoint and the reporter close the W&B run; one that is dead is passed over."""
        import ray

        ends = {"trainer": self.trainer and self.trainer.stop, "reporter": self.reporter and self.reporter.finish}
        for role, end in ends.items():
            try:
                if end is not None:
                    ray.get(end.remote(), timeout=_CLOSE_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.warning("the %s did not end in order: %s", role, " ".join(str(error).split())[:200])

    def _name(self, role: str) -> str:
        return f"{role}-{self._id}"


def _supervise(deployment: Deployment) -> int:
    """Run the server; when its process died, run the restarted one. Ends with exit code 0 after a stop signal."""
    import ray

    stopping = _StopSignals(deployment.server.stop.remote, partial(ray.kill, deployment.server))
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
                raise UserError(f"the server died {failures} times before it was ready; see {_ray_logs()}") from None
            log.warning("the server process died; it restarts with the newest published drafter")
            if deployment.config.cluster.address is None:
                standby.close()
                standby = Standby(url)
            if not _restarted(deployment, stopping):
                return 0


def _restarted(deployment: Deployment, stopping: "_StopSignals") -> bool:
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
            raise UserError(f"Ray did not start the server's process again; see {_ray_logs()}")
    return False


def _announce(deployment: Deployment, running: Any, stopping: "_StopSignals") -> str:
    """Say where the endpoint is, once it answers, and return its URL; empty when the server ended before that."""
    import ray

    address = deployment.server.address.remote()
    ready, _ = ray.wait([address, running], num_returns=1, timeout=deployment.config.server.start_timeout_s)
    if not ready:
        raise UserError(
            f"the server did not start within {deployment.config.server.start_timeout_s:.0f} s; "
            f"see {_ray_logs()}, or raise server.start_timeout_s"
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


def _ray_logs() -> str:
    """Where Ray keeps what the actors wrote."""
    import ray

    node = ray._private.worker._global_node
    return f"{node.get_logs_dir_path()}/worker-*.err" if node is not None else "Ray's logs"


class _StopSignals:
    """Calls `drain`, or `kill` while nothing is served, at the first SIGINT or SIGTERM; the second ends this process.

    A server that is starting is too busy to listen, and has nothing to drain.
    """

    def __init__(self, drain: Callable[[], object], kill: Callable[[], object]) -> None:
        self.received = False
        self.serving = False
        self._drain, self._kill = drain, kill
        self._queue: SimpleQueue[int] = SimpleQueue()  # unlike an Event it may be filled from a signal handler
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def wait(self, limit_s: float) -> bool:
        """Whether a signal came, at the latest after `limit_s`."""
        with suppress(Empty):
            self._queue.get(timeout=limit_s)
        return self.received

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            sys.exit(128 + number)
        self.received = True
        self._queue.put(number)
        (self._drain if self.serving else self._kill)()


def _start_ray(config: AuroraConfig) -> None:
    if config.cluster.address is None:
        stay_on_loopback()
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 is nearly the trainer's 19
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    if config.cluster.address is not None:
        try:
            ray.init(address=config.cluster.address, runtime_env=environment)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"--address {config.cluster.address}: no Ray cluster answers there ({error}); start one with "
                "`ray up ray_cluster.yaml`, or leave --address out"
            ) from error
        return
    cpus = max(os.cpu_count() or 1, 2)
    for tried in range(1, _RAY_STARTS + 1):
        try:
            ray.init(num_cpus=cpus, include_dashboard=False, runtime_env=environment, log_to_driver=False)
            return
        except Exception as error:
            if type(error) is not Exception:  # Ray raises the bare class, and only that, where its processes are late
                raise
            ray.shutdown()
            log.warning("Ray did not start (%s), try %d of %d", error, tried, _RAY_STARTS)
    raise UserError("Ray did not start; see /tmp/ray/session_latest/logs, or end what keeps this machine busy")


def _role(name: str) -> dict[str, float]:
    """The custom resource that ray_cluster.yaml gives the nodes of a role; nothing on a cluster without roles."""
    import ray

    return {name: 1.0} if name in ray.cluster_resources() else {}


def _server_environment(config: AuroraConfig) -> dict[str, str]:
    """What vLLM's server reads from the environment. Keys are not among it: Ray writes such variables to its logs."""
    return {"VLLM_MAX_N_SEQUENCES": str(config.limits.n), "VLLM_API_KEY": "", "VLLM_SERVER_DEV_MODE": "0"}


def _make_run_dir(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; give a directory that can be written") from error
