"""`aurora scale N`: more or fewer replicas of a running `aurora serve --replicas`."""

import json
import os
from pathlib import Path

from aurora.config import UserError
from aurora.deployment import DEPLOYMENT_FILE, NAMESPACE
from aurora.ray_access import require_token, stay_on_loopback

_ANSWER_S = 30.0


def scale(replicas: int, run_dir: Path) -> int:
    """Ask the Router of the deployment in `run_dir` for so many replicas; returns the exit code. Raises UserError."""
    if replicas < 1:
        raise UserError(f"{replicas} replicas: give 1 or more; a stop signal to `aurora serve` ends them all")
    address, name = _router_of(run_dir)
    require_token(insecure=os.environ.get("RAY_AUTH_MODE", "token") != "token")
    if address.startswith("127."):
        stay_on_loopback()
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
        router = ray.get_actor(name)
        ray.get(router.want.remote(replicas), timeout=_ANSWER_S)
        for each in ray.get(router.status.remote(), timeout=_ANSWER_S):
            state = f"{each['open']} of {each['places']} places taken" if each["up"] else "down"
            print(f"{each['name']}: {each['url']}, {state}")
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"--run-dir {run_dir}: its router does not answer ({error}); is `aurora serve` up?") from error
    finally:
        ray.shutdown()
    print(f"{replicas} replicas are wanted; the launcher starts or ends them one after the other")
    return 0


def _router_of(run_dir: Path) -> tuple[str, str]:
    """Ray's address and the Router's name. Raises UserError where nothing with several replicas runs."""
    file = run_dir.expanduser() / DEPLOYMENT_FILE
    try:
        record = json.loads(file.read_text())
        return str(record["address"]), str(record["router"])
    except OSError as error:
        raise UserError(
            f"--run-dir {run_dir}: no `aurora serve --replicas N` runs there ({file.name}: {error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged; start `aurora serve` anew, which writes it") from error
