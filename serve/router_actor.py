"""The Router actor: one endpoint in front of several Servers, and the say over which drafter version each may use."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from aurora.config import AuroraConfig
from aurora.rollout import Rollout
from serve.access import AccessMiddleware, open_paths
from serve.admission import Admission, AdmissionMiddleware
from serve.fleet import Fleet
from serve.listen import bind, http_server, split_tls, url_of
from serve.router import RouterApp

log = logging.getLogger(__name__)

_BACKLOG = 2048


class Router:
    """Answers at the address that users know. Holds no state that it cannot be told again.

    keys: any of them lets a request in; none: all come in. inner_key: what the replicas ask for.
    """

    def __init__(self, config: AuroraConfig, keys: Sequence[str], inner_key: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._config = config
        self._keys = keys
        self._fleet = Fleet(config.cluster.router)
        self._app = RouterApp(self._fleet, inner_key)
        self._admission = Admission(0)
        self._admission.engine_died = lambda: not self._fleet.living
        self._rollouts = {kind: Rollout(config.cluster.canary_s) for kind in ("eagle3", "model")}
        self._wanted: int | None = None
        self._url = ""
        self._http: Any = None
        self._ready = asyncio.Event()

    async def run(self, port: int | None = None) -> None:
        """Serve until `stop`. Raises UserError for an address or TLS files that cannot be used.

        port: where it was before a restart; None: as configured.
        """
        server = self._config.server
        sock = bind(server.host, port or server.port, shared=port is not None)
        tls, _ = split_tls(self._config.vllm_args)
        self._http = http_server(self._guarded(), self._config.limits, tls)
        async with self._app:
            sock.listen(_BACKLOG)
            self._url = url_of(sock, tls=bool(tls))
            self._ready.set()
            await self._http.serve(sockets=[sock])

    def _guarded(self) -> Any:
        admitted = AdmissionMiddleware(self._app, self._admission, self._config.limits)
        return AccessMiddleware(admitted, self._keys, open_paths(self._config.server)) if self._keys else admitted

    async def address(self) -> str:
        """The URL of the endpoint, once requests are taken."""
        await self._ready.wait()
        return self._url

    async def stop(self) -> None:
        """Refuse new requests, let open ones finish for `server.drain_s`, and end `run`."""
        late = await self._admission.drain(self._config.server.drain_s)
        if late:
            log.warning("%d requests were cut off after %g s (server.drain_s)", late, self._config.server.drain_s)
        if self._http is not None:
            self._http.should_exit = True

    async def join(self, name: str, url: str, places: int) -> None:
        """A replica answers at `url` and takes `places` requests at once. Joining again is a restart."""
        await self._fleet.join(name, url, places)
        self._admission.places = self._fleet.places
        log.info("%s answers at %s", name, url)

    async def leave(self, name: str) -> None:
        """A replica is gone, or is about to go: it gets no more requests."""
        await self._fleet.leave(name)
        self._admission.places = self._fleet.places
        log.info("%s has left", name)

    async def status(self) -> list[dict[str, Any]]:
        """What is known of each replica: name, url, up, open requests, places, versions that it may use."""
        approved = {kind: rollout.approved for kind, rollout in self._rollouts.items() if rollout.approved}
        return [
            {"name": r.name, "url": r.url, "up": r.up, "open": len(r.open), "places": r.places, "approved": approved}
            for r in self._fleet.replicas
        ]

    async def want(self, replicas: int) -> None:
        """Somebody wants so many replicas; the launcher asks for it with `wanted`."""
        self._wanted = replicas

    async def wanted(self) -> int | None:
        """Replicas that were asked for since the start; None: nobody did."""
        return self._wanted

    async def allowed(self, kind: str, replica: str, live: int, latest: int) -> tuple[int, str]:
        """The newest version that a replica may use, and why its live one has to go ("": it has not)."""
        rollout = self._rollouts[kind]
        names = {r.name for r in self._fleet.living} | {replica}
        now_s = time.monotonic()
        return rollout.allowed(replica, names, live, latest, now_s), rollout.refuses(live, now_s)

    async def observe(self, kind: str, live: int, first_drafts: Mapping[int, tuple[int, int]]) -> None:
        """A replica tells how good its drafts were (`Rollout.observe`)."""
        self._rollouts[kind].observe(live, first_drafts)


def make_router_actor(config: AuroraConfig, name: str, keys: Sequence[str], inner_key: str) -> Any:
    """Create the actor on this node, which has the address that users know. Ray restarts it without limit."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), False)
    actor = ray.remote(Router).options(
        name=name, num_cpus=0, max_restarts=-1, max_concurrency=256, scheduling_strategy=here
    )
    return actor.remote(config, keys, inner_key)
