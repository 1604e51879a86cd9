"""What will stop `aurora serve` on a machine or cost it speed, with the remedy for each: pure, one function a check.

`aurora.machine` finds the facts. A check whose subject cannot be seen (a container, a virtual machine) says so and asks
for nothing.
"""

import errno
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path

from aurora.config import AuroraConfig
from aurora.environment import Finding, kv_cache_bytes

RAY_CLUSTER = "/tmp/ray/ray_current_cluster"  # noqa: S108  where `ray start` leaves its address
_MIB, _GIB = 1 << 20, 1 << 30
_UNSEEN = "not visible here"
_SHARED = "/dev/shm"  # noqa: S108
_PROCESSES_GIB = 2.0  # of Ray, the server's and the trainer's processes beside weights, caches and replay


def threads(cores: int, omp: str | None, trainer: int) -> Finding:
    """More threads than cores take turns: `omp` is OMP_NUM_THREADS, `trainer` the trainer's threads."""
    said = f"{cores} cores, OMP_NUM_THREADS {omp or 'unset'}, trainer {trainer}"
    if omp and omp.isdigit() and int(omp) > cores:
        return Finding("threads", said, f"unset OMP_NUM_THREADS, or set it to {cores} at most")
    if trainer > max(cores - 1, 1):
        return Finding("threads", said, f"--trainer-threads {max(cores - 1, 1)}: one core at least must be serving's")
    return Finding("threads", said)


def quota(cores: int, cpu_max: str | None) -> Finding:
    """A container's CPU quota (cgroup v2, "QUOTA PERIOD") below its cores stops all threads for part of each period."""
    if cpu_max is None or cpu_max.startswith("max"):
        return Finding("CPU quota", "none" if cpu_max else _UNSEEN)
    allowed, period = map(float, cpu_max.split())
    share = allowed / period
    remedy = f"give the container {cores} CPUs, or pin it to {max(int(share), 1)} cores (--cpuset-cpus)"
    return Finding("CPU quota", f"{share:.1f} of {cores} cores", remedy if share < cores else "")


def load(cores: int, load_1min: float) -> Finding:
    """Others' work on the same cores slows each step, and the trainer's share of idle time with it."""
    said = f"{load_1min:.1f} on {cores} cores"
    return Finding("load", said, "end what else computes here, or serve elsewhere" if load_1min > 1.5 * cores else "")


def governor(governors: Sequence[str]) -> Finding:
    """Clock rates that follow the load rise late for steps of some milliseconds."""
    slow = [name for name in governors if name != "performance"]
    remedy = "cpupower frequency-set -g performance" if slow else ""
    return Finding("CPU governor", ", ".join(governors) or _UNSEEN, remedy)


def huge_pages(enabled: str | None) -> Finding:
    """Weights in pages of 4 KiB cost address translation; `enabled` is the kernel's list, its choice in brackets."""
    chosen = re.search(r"\[(\w+)\]", enabled or "")
    if chosen is None:
        return Finding("huge pages", _UNSEEN)
    remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)" if chosen[1] == "never" else ""
    return Finding("huge pages", chosen[1], remedy)


def swap(used: int, overcommit: str | None) -> Finding:
    """Weights that are swapped out stall steps; strict overcommit refuses what is reserved and never touched."""
    said = f"{used / _GIB:.1f} GiB swapped, overcommit_memory {overcommit or _UNSEEN}"
    if overcommit == "2":
        return Finding("swap", said, "sysctl vm.overcommit_memory=0: Ray and torch reserve more than they use")
    return Finding("swap", said, "free memory, then swapoff -a && swapon -a" if used > _GIB else "")


def open_files(limit: int) -> Finding:
    """Each connection and each of Ray's channels is an open file."""
    if limit in (resource.RLIM_INFINITY, -1):
        return Finding("open files", "unlimited")
    remedy = "ulimit -n 65536: connections and Ray's channels are refused beyond" if limit < 4096 else ""
    return Finding("open files", f"{limit:,}", remedy)


def shared_memory(size: int | None) -> Finding:
    """Ray's object store lies in /dev/shm and falls back to the disk where that is small."""
    if size is None:
        return Finding(_SHARED, _UNSEEN)
    remedy = "docker run --shm-size=2g: Ray's object store goes to the disk" if size < _GIB else ""
    return Finding(_SHARED, f"{size / _GIB:.1f} GiB", remedy)


def disk(name: str, directory: Path, free: int, needed: int) -> Finding:
    """Versions, checkpoints, logged traces and models that do not fit are not kept."""
    remedy = f"free {needed / _GIB:.1f} GiB at {directory}, or give another place" if free < needed else ""
    return Finding(f"{name} disk", f"{free / _GIB:.1f} GiB free at {directory}", remedy)


def memory(available: int, weights: int, config: AuroraConfig) -> Finding:
    """Weights, KV cache, replay, tables and traces together on a CPU."""
    kv = kv_cache_bytes(available)
    traces = config.capture.sink_mib * (1 + config.learning)
    mine = config.trainer.replay_mib * config.learning + config.speculation.ngram_mib + traces
    needed = weights + kv + mine * _MIB + _PROCESSES_GIB * _GIB
    parts = f"weights {weights / _GIB:.1f}, KV cache {kv / _GIB:.1f}"
    said = f"{available / _GIB:.1f} GiB free, {needed / _GIB:.1f} GiB at most: {parts}"
    remedy = (
        "lower trainer.replay_mib and speculation.ngram_mib, or serve a smaller model" if needed > available else ""
    )
    return Finding("memory", said, remedy, fatal=weights > available)


def port(host: str, number: int, error: int | None) -> Finding:
    """`error` is what binding to the port failed with."""
    said = f"{host}:{number}"
    if error is None:
        return Finding("port", f"{said} is free" if number else "any")
    reason = "is taken" if error == errno.EADDRINUSE else os.strerror(error)
    return Finding("port", f"{said} {reason}", "end the server there, or give another --port or --host", fatal=True)


def other_ray(processes: Sequence[tuple[int, str, str]], me: str) -> Finding:
    """Ray processes that run: (pid, name, user). Left over ones hold cores and memory."""
    if not processes:
        return Finding("Ray processes", "none")
    mine = [pid for pid, _, user in processes if user == me]
    said = ", ".join(f"{name} {pid} ({user})" for pid, name, user in processes[:4])
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    ask = f"if nobody needs them: kill {' '.join(map(str, mine[:8]))}" if mine else "ask their users"
    return Finding("Ray processes", said + more, f"they share cores and memory with a server; {ask}")


def ray_address(variable: str | None, recorded: str | None, wanted: str | None) -> Finding:
    """A cluster that Ray joins by itself is not one that `aurora serve` can start its own Ray beside."""
    found = {"RAY_ADDRESS": variable, RAY_CLUSTER: recorded}
    for place, address in found.items():
        if address and wanted is None:
            remedy = "give --address auto to join it, or " + (
                "unset RAY_ADDRESS" if variable else "end it by `ray stop`"
            )
            return Finding("Ray address", f"{address} ({place})", remedy, fatal=bool(variable))
    return Finding("Ray address", wanted or "a Ray of its own")


def wandb_login(mode: str, has_key: bool) -> Finding:
    """Only the online mode needs a key."""
    if mode == "online" and not has_key:
        return Finding("W&B", "online, no key", "`wandb login`, set WANDB_API_KEY, or --wandb offline", fatal=True)
    return Finding("W&B", mode)


def clock(now_s: float, installed_s: float, synchronised: bool | None) -> Finding:
    """TLS, W&B and the age of logged traces go by the wall clock."""
    if now_s < installed_s:
        return Finding("clock", "earlier than this installation", "set the clock: timedatectl set-ntp true")
    if synchronised is None:
        return Finding("clock", _UNSEEN)
    remedy = (
        "" if synchronised else "timedatectl set-ntp true, or let the host keep time: certificates and logs go by it"
    )
    return Finding("clock", "kept by NTP" if synchronised else "not synchronised", remedy)


def engine_build(gpu: bool, torch_cuda: str | None, driver_cuda: str | None, cpu_engine: bool) -> Finding:
    """Whether torch and vLLM are built for this machine. `torch_cuda`, `driver_cuda`: CUDA versions, None for none."""
    said = f"torch for {'CUDA ' + torch_cuda if torch_cuda else 'CPU'}, vLLM for {'CPU' if cpu_engine else 'GPU'}"
    if not gpu:
        wrong = "no GPU answers here: run `make install EXTRA=cpu`, or mend the driver (`nvidia-smi`)"
        return Finding("engine build", said, "" if cpu_engine else wrong, fatal=not cpu_engine)
    if cpu_engine or torch_cuda is None:
        return Finding("engine build", said, "run `make install EXTRA=gpu`: the GPU is not used", fatal=not cpu_engine)
    if driver_cuda and int(driver_cuda.split(".")[0]) < int(torch_cuda.split(".")[0]):
        remedy = f"the driver knows CUDA {driver_cuda} at most: install a newer driver"
        return Finding("engine build", said, remedy, fatal=True)
    return Finding("engine build", f"{said}, driver for CUDA {driver_cuda or '?'}")
