"""numba's `njit`, with a cache of its own for each state of the sources that are compiled together.

numba looks for changes in the file of the function that it compiles, not in those of what that function calls or of the
constants that it uses: after an upgrade one module would go on with another's old code.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

from aurora.config import cache_root

# Modules of aurora.
SOURCES = ("acceptance", "batching", "controller", "goodput", "replica_states", "speculation_rules", "step_time")

_F = TypeVar("_F", bound=Callable[..., Any])


def _directory() -> Path:
    """Where machine code of these sources is kept."""
    content = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in SOURCES)
    return cache_root() / "compiled" / hashlib.sha256(content).hexdigest()[:16]


_DIRECTORY = _directory()


def compiled(function: _F) -> _F:
    """Compile at the first call, once per machine."""
    usual = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_DIRECTORY)
    try:
        made: _F = numba.njit(cache=True)(function)
    finally:
        numba.config.CACHE_DIR = usual
    return made
