"""Who may use the Ray cluster: whoever reaches its ports can run code on it, so that they ask for a token.

A cluster of this machine alone listens on 127.0.0.1 and nowhere else.
"""

import logging
import os
import secrets
import stat
from pathlib import Path

from aurora.config import UserError

log = logging.getLogger(__name__)

_ON_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # what it is called; Ray reads it on Linux, too
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"  # variables that Ray reads
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def require_token(insecure: bool) -> None:
    """Let Ray ask for a token, of which nobody else can read the file; call before Ray starts.

    Raises UserError for a cluster that asks for none, unless `insecure`, and for a file that cannot be kept private.
    """
    if os.environ.setdefault(_MODE, "token") != "token":
        if insecure:
            return
        raise UserError(
            f"{_MODE}={os.environ[_MODE]}: whoever reaches Ray's ports could run code here; unset it, or say --insecure"
        )
    if not os.environ.get(_TOKEN):
        keep_private(Path(os.environ.get(_TOKEN_PATH) or "~/.ray/auth_token").expanduser())


def stay_on_loopback() -> None:
    """Let the cluster that this process starts listen on 127.0.0.1 only; call before `ray` is imported."""
    os.environ[_ON_SEVERAL_MACHINES] = "0"


def keep_private(file: Path) -> None:
    """Make the token file if it is missing, and leave it to its owner alone. Raises UserError where that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if file.stat().st_mode & _OTHERS:
                file.chmod(0o600)
                log.warning("%s: others could read Ray's token; now they cannot", file)
            return
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
    except OSError as error:
        raise UserError(
            f"{file}: Ray's token cannot be kept there ({error.strerror}); name another file in {_TOKEN_PATH}"
        ) from error
