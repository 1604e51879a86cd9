"""Loaded by vLLM in each of its processes (seam: entry point `vllm.general_plugins`); acts only inside Aurora's server.

An engine whose server was killed would live on, hold the memory and keep a core busy: the kernel is told to end each
vLLM process with its parent.
"""

import ctypes
import os
import signal

ENGINE_ENV = "AURORA_ENGINE"
_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Tie this process to its parent's life, if it belongs to Aurora and is not the server process itself."""
    server = os.environ.get(ENGINE_ENV)
    if server is None or server == str(os.getpid()):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
