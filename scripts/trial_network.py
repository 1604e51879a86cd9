"""Several machines on one host, as far as a network goes: namespaces with an address each, cables, and one switch.

Needs root and iproute2. Everything has a name that begins with this process's own prefix, and is taken away at the end
together with the processes in the namespaces, which are found by the namespace they are in and by nothing else.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from aurora.config import UserError

_END_S = 20.0


class Network:
    """A switch, a cable to each machine's namespace, and the host at the switch. Use inside `with`."""

    def __init__(self, machines: Sequence[str]) -> None:
        """Raises UserError where such a network cannot be made."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise UserError("network namespaces need root and the command `ip`: run as root, install iproute2")
        tag = os.getpid() % 10_000
        self._prefix = f"at{tag}"
        self._subnet = f"10.213.{tag % 250 + 1}"
        self._cables = {name: f"{self._prefix}c{i}" for i, name in enumerate(machines)}
        self._addresses = {name: f"{self._subnet}.{i + 10}" for i, name in enumerate(machines)}

    def __enter__(self) -> Self:
        bridge = f"{self._prefix}b"
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{self._subnet}.1/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for name, cable in self._cables.items():
                space = self.namespace(name)
                _ip("netns", "add", space)
                _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", cable, "master", bridge, "up")
                _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                _ip("-n", space, "link", "set", "lo", "up")
        except UserError:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in self._cables:
            self.end(name)
        self._remove()

    def _remove(self) -> None:
        for name in self._cables:
            _ip("netns", "del", self.namespace(name), check=False)  # its cable goes with it
        _ip("link", "del", f"{self._prefix}b", check=False)

    def namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def address(self, name: str) -> str:
        return self._addresses[name]

    def inside(self, name: str, command: Sequence[str], mounts: Mapping[Path, Path] | None = None) -> list[str]:
        """The command as run on that machine. mounts: directories that it sees where others see something else."""
        for place, directory in (mounts or {}).items():
            command = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(directory), str(place), *command]
        return ["ip", "netns", "exec", self.namespace(name), *command]

    def plug(self, name: str, inserted: bool) -> None:
        """Put the machine's cable in, or pull it out: nobody is told, packets are lost."""
        _ip("link", "set", self._cables[name], "up" if inserted else "down")

    def part(self, names: Sequence[str], apart: bool) -> None:
        """Let no packet between these machines pass, or let them again; all others reach them as ever."""
        for name in names:
            _ip("link", "set", self._cables[name], "type", "bridge_slave", "isolated", "on" if apart else "off")

    def processes(self, name: str) -> list[psutil.Process]:
        """Every process on that machine."""
        found = []
        for pid in _ip("netns", "pids", self.namespace(name), check=False).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found

    def end(self, name: str) -> None:
        """Kill all that runs on that machine."""
        end_s = time.monotonic() + _END_S
        while (left := self.processes(name)) and time.monotonic() < end_s:
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=2)

    @property
    def addresses(self) -> Mapping[str, str]:
        return self._addresses


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise UserError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; this host lets no such network be made")
    return done.stdout
