"""The actors of one `aurora serve`. They know each other by name, so that a restarted one finds the others."""

import json
import logging
import os
import secrets
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from aurora.config import AuroraConfig, UserError
from aurora.environment import engine_environment

log = logging.getLogger(__name__)

NAMESPACE = "aurora"  # of the actors in Ray
DEPLOYMENT_FILE = "deployment.json"  # in run_dir, while several servers run: where Ray is, and the Router's name
_CLOSE_TIMEOUT_S = 60.0


class Deployment:
    """Reporter, Trainer, and the Server; of several Servers the Router, and Servers as they are asked for."""

    def __init__(self, config: AuroraConfig, model_dir: Path, keys: Sequence[str]) -> None:
        self.config = config
        self._model_dir = model_dir
        self._id = uuid.uuid4().hex[:8]
        self._reporter_name = self._name("reporter") if config.reporter.mode != "disabled" else None
        self._trainer_name = self._name("trainer") if config.learning else None
        self._source_name = self._name("drafters") if config.ships_drafters else None
        self.reporter = self._make_reporter() if self._reporter_name is not None else None
        place = self._make_source(self._source_name) if self._source_name is not None else {}
        self.trainer = self._make_trainer(place) if self._trainer_name is not None else None
        self.router: Any = None  # of several servers
        self.server: Any = None  # the only one
        if config.routed:
            self._inner_key = secrets.token_hex(32)
            from serve.router_actor import make_router_actor

            self.router = make_router_actor(config, self._name("router"), keys, self._inner_key)
            self._say_where(self._name("router"))
        else:
            self.server = self._make_server(keys)

    def make_replica(self, number: int) -> Any:
        """One more Server behind the Router."""
        return self._make_server([self._inner_key], replica_name(number), self._name("router"), number)

    def _make_server(self, keys: Sequence[str], replica: str = "", router: str | None = None, number: int = 0) -> Any:
        from serve.actor import Peers, make_server_actor

        return make_server_actor(
            self.config,
            self._model_dir,
            keys,
            Peers(self._trainer_name, self._reporter_name, self._source_name, router, replica),
            environment=_engine_environment(self.config, number) | _server_environment(self.config),
            resources=_role("serve"),
        )

    def _make_reporter(self) -> Any:
        from aurora.dashboard import make_reporter_actor

        return make_reporter_actor(self.config, self._reporter_name)

    def _make_source(self, name: str) -> dict[str, float]:
        """The actor that hands out drafters; gives the resources that it and the trainer must have where they are."""
        from aurora.store_source import learning_place, make_store_source

        place = learning_place("train")
        self.source = make_store_source(self.config, name, place)
        return place

    def _make_trainer(self, place: dict[str, float]) -> Any:
        from trainer.actor import make_trainer_actor

        role, server = _role("train"), self.config.server  # nodes with a role are the trainers' own
        servers = self.config.cluster.replicas
        taken = {} if role else {"CPU": servers * (server.num_cpus or 1.0), "GPU": servers * server.num_gpus}
        return make_trainer_actor(
            self.config,
            self._model_dir,
            self._trainer_name,
            self._reporter_name,
            resources=role,
            place=place,
            taken=taken,
        )

    def _say_where(self, router: str) -> None:
        """For `aurora scale`. Raises UserError where run_dir takes nothing."""
        import ray

        file = self.config.run_dir / DEPLOYMENT_FILE
        try:
            file.write_text(json.dumps({"address": ray.get_runtime_context().gcs_address, "router": router}))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; give a --run-dir that can be written") from error

    def close(self) -> None:
        """Let the trainer write its checkpoint and the reporter close the W&B run; one that is dead is passed over."""
        import ray

        with suppress(OSError):
            (self.config.run_dir / DEPLOYMENT_FILE).unlink(missing_ok=True)
        ends = {"trainer": self.trainer and self.trainer.stop, "reporter": self.reporter and self.reporter.finish}
        for role, end in ends.items():
            try:
                if end is not None:
                    ray.get(end.remote(), timeout=_CLOSE_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.warning("the %s did not end in order: %s", role, " ".join(str(error).split())[:200])

    def _name(self, role: str) -> str:
        return f"{role}-{self._id}"


def replica_name(number: int) -> str:
    """Of the server `number`; in the order of numbers also when sorted as text."""
    return f"replica-{number:03d}"


def ray_logs() -> str:
    """Where Ray keeps what the actors wrote, in words."""
    directory = ray_log_directory()
    return f"{directory}/worker-*.err" if directory is not None else "Ray's logs"


def ray_log_directory() -> Path | None:
    """The log directory of this machine's node; None while there is none."""
    import ray

    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node is not None else None


def cpus_wanted(config: AuroraConfig) -> int:
    """Ray CPUs that all actors take together."""
    servers = config.cluster.replicas * (config.server.num_cpus or 1)
    return -int(-(servers + (config.trainer.threads * config.trainer.workers if config.learning else 0)) // 1)


def _engine_environment(config: AuroraConfig, number: int) -> dict[str, str]:
    """Replicas on this machine share its cores out. On another machine, which may have a GPU where this one has none,
    vLLM binds its threads itself and takes the runner that Aurora's seams are in."""
    if config.cluster.address is not None:
        environment = engine_environment() | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
        return {name: value for name, value in environment.items() if name != "VLLM_CPU_OMP_THREADS_BIND"}
    if config.cluster.replicas > 1:
        return engine_environment(cores=_share(sorted(os.sched_getaffinity(0)), number, config.cluster.replicas))
    return engine_environment()


def _share(cores: Sequence[int], number: int, among: int) -> Sequence[int]:
    """Neighbouring cores for the replica `number`; at least one, which replicas beyond the number of cores share."""
    size = max(len(cores) // among, 1)
    start = number % max(len(cores) // size, 1) * size
    return cores[start : start + size]


def _role(name: str) -> dict[str, float]:
    """The custom resource that ray_cluster.yaml gives the nodes of a role; nothing on a cluster without roles."""
    import ray

    return {name: 1.0} if name in ray.cluster_resources() else {}


def _server_environment(config: AuroraConfig) -> dict[str, str]:
    """What vLLM's server reads from the environment. Keys are not among it: Ray writes such variables to its logs."""
    return {"VLLM_MAX_N_SEQUENCES": str(config.limits.n), "VLLM_API_KEY": "", "VLLM_SERVER_DEV_MODE": "0"}
