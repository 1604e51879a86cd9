"""`aurora scale N`: more or fewer replicas of a running `aurora serve --replicas`."""

import os

from aurora.config import UserError
from aurora.deployment import NAMESPACE
from aurora.ray_access import require_token

_ANSWER_S = 30.0


def scale(replicas: int, address: str, name: str | None) -> int:
    """Ask the Router of a deployment for `replicas`; returns the exit code.

    name: the Router's actor, needed where several deployments share a cluster. Raises UserError.
    """
    if replicas < 1:
        raise UserError(f"{replicas} replicas: give 1 or more; a stop signal to `aurora serve` ends them all")
    require_token(insecure=os.environ.get("RAY_AUTH_MODE", "token") != "token")
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({error}); is `aurora serve` up?"
        ) from error
    try:
        router = ray.get_actor(_only_router(name))
        ray.get(router.want.remote(replicas), timeout=_ANSWER_S)
        for each in ray.get(router.status.remote(), timeout=_ANSWER_S):
            state = f"{each['open']} of {each['places']} places taken" if each["up"] else "down"
            print(f"{each['name']}: {each['url']}, {state}")
    except (ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"the router does not answer ({type(error).__name__}); try again in a moment") from error
    finally:
        ray.shutdown()
    print(f"{replicas} replicas are wanted; the launcher starts or ends them one after the other")
    return 0


def _only_router(name: str | None) -> str:
    """The Router's name. Raises UserError where none or several could be meant."""
    from ray.util import list_named_actors

    found = sorted(each for each in list_named_actors() if each.startswith("router-"))
    if name in found:
        return str(name)
    if name is not None:
        raise UserError(f"--router {name}: not there; there are {', '.join(found) or 'none'}")
    if len(found) != 1:
        hint = f"name one with --router: {', '.join(found)}" if found else "start one with `aurora serve --replicas 2`"
        raise UserError(f"{len(found)} deployments with several replicas in this cluster; {hint}")
    return str(found[0])
