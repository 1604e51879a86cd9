"""Helpers (`trainer.crew`) as processes of this machine, for training without Ray."""

import multiprocessing
import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from aurora.config import TrainerConfig, UserError
from drafters.target import TargetWeights
from trainer.member import Member
from trainer.parallel import use_interface
from trainer.priority import yield_to_others

LOOPBACK = "127.0.0.1"


def start_helpers(settings: TrainerConfig, target_dir: Path) -> list["LocalHelper"]:
    """Of this machine's processes as many as there are workers besides this one; each has a GPU if training uses any.

    Raises UserError when there are not as many GPUs.
    """
    on_gpu = settings.num_gpus > 0
    if on_gpu and settings.workers > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"trainer.workers {settings.workers}: each takes a GPU and there are {there}; give fewer")
    devices = [f"cuda:{rank}" if on_gpu else "cpu" for rank in range(1, settings.workers)]
    return [LocalHelper(settings, target_dir, device) for device in devices]


class LocalHelper:
    """One process; started again at the next call after it died."""

    def __init__(self, settings: TrainerConfig, target_dir: Path, device: str) -> None:
        self._arguments = (settings, target_dir, device)
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=self._arguments)

    def submit(self, method: str, *args: Any) -> Future[Any]:
        """Call a method of the member; `ready` returns its process's id."""
        try:
            return self._pool.submit(_call, method, args)
        except BrokenProcessPool:
            self._pool = self._start()
            return self._pool.submit(_call, method, args)

    def close(self) -> None:
        """End the process after the call it is in."""
        self._pool.shutdown(wait=True, cancel_futures=True)


_members: list[Member] = []  # of this process, one


def _begin(settings: TrainerConfig, target_dir: Path, device: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    yield_to_others(settings.nice)
    torch.set_num_threads(settings.threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    use_interface(LOOPBACK)
    _members.append(Member(settings, TargetWeights.load(target_dir, device), device))


def _call(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_members[0], method)(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
