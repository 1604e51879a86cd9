"""Several Servers behind one Router: each is kept running by a thread of its own, and more or fewer can be asked for.

A Server that died is started anew by Ray, on another node if its own is gone; its keeper sets it to work again and
tells the Router where it answers. The Router is kept running in the same way, and told again who is there.
"""

import logging
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from aurora.config import UserError
from aurora.deployment import Deployment, ray_logs, replica_name
from aurora.standby import Standby
from aurora.start_notice import StartNotice
from aurora.stop_signals import StopSignals

log = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_PAUSE_S = 2.0
_LOOK_S = 1.0
_TELL_S = 30.0
_ROUTER_START_S = 120.0


class Keeper(threading.Thread):
    """Keeps one Server running until `leave`. Its `error` says why it gave up; "" while it has not."""

    def __init__(self, deployment: Deployment, number: int) -> None:
        super().__init__(name=replica_name(number), daemon=True)
        self.error = ""
        self.place: tuple[str, int] | None = None  # URL and places, while it serves
        self._deployment = deployment
        self._server = deployment.make_replica(number)
        self._leaving = threading.Event()
        self._served = False  # ever

    def run(self) -> None:
        """Start the Server's work until it ends in order."""
        import ray

        failures = 0
        while not self._leaving.is_set():
            running = self._server.run.remote()
            try:
                failures = 0 if self._join(running) else failures + 1
                ray.get(running)
                break
            except ray.exceptions.RayTaskError as error:
                said = str(error.cause) if isinstance(error.cause, UserError) else str(error)
                if not self._served or failures >= _MAX_FAILED_STARTS:
                    self.error = said
                    break
                log.warning("%s did not start again (%s); it is tried anew", self.name, said[:300])
                failures += 1
                ray.kill(self._server, no_restart=False)  # half of an engine may be left in its process
                self._leaving.wait(_PAUSE_S)
                self._restarted()
            except ray.exceptions.RayActorError:
                self.place = None
                if self._leaving.is_set():
                    break
                log.warning("%s died; it restarts with the newest approved drafter", self.name)
                if failures >= _MAX_FAILED_STARTS:
                    self.error = f"it died {failures} times before it was ready; see {ray_logs()}"
                    break
                self._leaving.wait(_PAUSE_S)
                self._restarted()
        self.place = None
        tell(self._deployment.router, "leave", self.name)

    def _join(self, running: Any) -> bool:
        """Let the Router know of it, once it answers; False when it ended before that."""
        import ray

        address = self._server.address.remote()
        ready, _ = ray.wait([address, running], num_returns=1)
        if running in ready:
            return False
        try:
            self.place = ray.get([address, self._server.places.remote()])
        except ray.exceptions.RayActorError:
            return False
        self._served = True
        self.introduce()
        return True

    def introduce(self) -> None:
        """Tell the Router where it answers, if it does."""
        place = self.place
        if place is not None:
            tell(self._deployment.router, "join", self.name, *place)

    def _restarted(self) -> None:
        """Wait until Ray has a process for it, for as long as that takes: its node may have to come back."""
        import ray

        while not self._leaving.is_set():
            with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                ray.get(self._server.pid.remote(), timeout=_PAUSE_S)
                return
            self._leaving.wait(_PAUSE_S)

    def leave(self) -> None:
        """Send it no more requests, let it finish those that are open, and end it. Returns at once."""
        self._leaving.set()
        tell(self._deployment.router, "leave", self.name)
        if self.place is None:
            self.kill()
        else:
            self._server.stop.remote()

    def kill(self) -> None:
        """End it without ado."""
        import ray

        self._leaving.set()
        ray.kill(self._server)


class Fleet:
    """The keepers of all replicas."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self.keepers: list[Keeper] = []

    def scale(self, replicas: int) -> None:
        """Have so many of them; those that were started last go first."""
        while len(self.keepers) > replicas:
            log.info("%s leaves", self.keepers[-1].name)
            self.keepers.pop().leave()
        while len(self.keepers) < replicas:
            keeper = Keeper(self._deployment, len(self.keepers))
            self.keepers.append(keeper)
            keeper.start()

    @property
    def serving(self) -> int:
        return sum(keeper.place is not None for keeper in self.keepers)

    def refuse_failed(self) -> None:
        """Raise UserError when none serves and one has given up; else one that gave up is named in the log, once."""
        for keeper in [k for k in self.keepers if k.error]:
            if not self.serving:
                raise UserError(f"{keeper.name}: {keeper.error}")
            log.error("%s is given up: %s", keeper.name, keeper.error)
            self.keepers.remove(keeper)

    def introduce(self) -> None:
        """Tell a new Router of all."""
        for keeper in self.keepers:
            keeper.introduce()

    def end(self, limit_s: float) -> None:
        """End all; those that are not through after `limit_s` without ado."""
        end_s = time.monotonic() + limit_s
        for keeper in self.keepers:
            keeper.leave()
        for keeper in self.keepers:
            keeper.join(max(end_s - time.monotonic(), 0.0))
            if keeper.is_alive():
                keeper.kill()

    def kill(self) -> None:
        """End all without ado."""
        for keeper in self.keepers:
            keeper.kill()


def tell(router: Any, method: str, *arguments: object) -> Any:
    """Ask the Router for something; None when it does not answer, as while it restarts: it is told again then."""
    import ray

    try:
        return ray.get(getattr(router, method).remote(*arguments), timeout=_TELL_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        log.debug("the router does not answer: %s", error)
        return None


def supervise(deployment: Deployment) -> int:
    """Keep Router and replicas running until a stop signal; returns the exit code."""
    import ray

    router, config = deployment.router, deployment.config
    fleet = Fleet(deployment)
    stopping = StopSignals(router.stop.remote, fleet.kill)
    url, running = _start_router(router)
    fleet.scale(config.cluster.replicas)
    notice = StartNotice()
    try:
        while stopping.serving or not stopping.received:
            done, _ = ray.wait([running], timeout=_LOOK_S)
            if done and stopping.received:
                break
            if done:
                running = _restart_router(router, running, url)
                fleet.introduce()
            fleet.refuse_failed()
            fleet.scale(tell(router, "wanted") or config.cluster.replicas)
            if not stopping.serving and fleet.serving:
                stopping.serving = True
                print(f"aurora: {config.model} answers at {url}/v1", flush=True)
            elif not stopping.serving:
                notice.look()
        return 0
    finally:
        fleet.end(config.server.drain_s + _TELL_S)


def _start_router(router: Any, port: int | None = None) -> tuple[str, Any]:
    """Where it answers, and what ends when it does. Raises UserError for what the user can mend."""
    import ray

    end_s = time.monotonic() + _ROUTER_START_S
    while time.monotonic() < end_s:
        running, address = router.run.remote(port), router.address.remote()
        try:
            ready, _ = ray.wait([address, running], num_returns=1, timeout=_ROUTER_START_S)
            ray.get(ready)
            if address in ready:
                return ray.get(address), running
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError:
            time.sleep(_PAUSE_S)  # Ray starts its process anew; one that dies at once must not spin
    raise UserError(f"the router did not start within {_ROUTER_START_S:.0f} s; see {ray_logs()}")


def _restart_router(router: Any, ended: Any, url: str) -> Any:
    """Set the Router to work again where it was. Raises what it ended with if its process did not die."""
    import ray

    with suppress(ray.exceptions.RayActorError):
        ray.get(ended)
    log.warning("the router died; it restarts")
    standby = Standby(url)
    try:
        return _start_router(router, urlsplit(url).port)[1]
    finally:
        standby.close()
