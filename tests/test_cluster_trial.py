"""The parts of the trial on several machines that need no cluster: the network, and what is made of the numbers."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aurora.config import UserError
from scripts.cluster_trial import Table
from scripts.trial_network import Network
from scripts.trial_traffic import Round, summed
from tests.waiting import wait_until

_LISTEN = """
import socket, sys
listening = socket.create_server((sys.argv[1], 7))
print(flush=True)
while True:
    listening.accept()[0].close()
"""


@pytest.fixture
def may_have_networks() -> None:
    """Skips where there can be none."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("networks need root and iproute2")
    made = subprocess.run(["ip", "link", "add", "attrial", "type", "bridge"], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", "attrial"], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"this host makes no bridge: {made.stderr.decode().strip()}")


@pytest.fixture
def network(may_have_networks: None) -> Iterator[Network]:
    with Network(["a", "b", "c"]) as network:
        yield network


def listens(network: Network, name: str) -> None:
    command = network.inside(name, [sys.executable, "-c", _LISTEN, network.address(name)])
    running = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert running.stdout is not None
    assert running.stdout.readline() == b"\n"


def reaches(network: Network, name: str, other: str) -> bool:
    code = "import socket, sys; socket.create_connection((sys.argv[1], 7), timeout=1)"
    command = network.inside(name, [sys.executable, "-c", code, network.address(other)])
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def answers(network: Network, name: str) -> bool:
    try:
        socket.create_connection((network.address(name), 7), timeout=1).close()
    except OSError:
        return False
    return True


def test_machines_are_reached_until_a_cable_is_pulled_or_they_are_parted(network: Network) -> None:
    for name in ("a", "b"):
        listens(network, name)
    assert reaches(network, "a", "b")
    assert answers(network, "a")
    network.part(["a", "b"], True)
    assert not reaches(network, "a", "b")
    assert reaches(network, "c", "b")
    assert answers(network, "b")
    network.part(["a", "b"], False)
    assert reaches(network, "a", "b")
    network.plug("a", False)
    assert not answers(network, "a")
    assert answers(network, "b")
    network.plug("a", True)
    wait_until(lambda: answers(network, "a"), 20, "it is reached again")


def test_a_machine_sees_directories_of_its_own_and_loses_its_processes_alone(network: Network, tmp_path: Path) -> None:
    place, own = tmp_path / "place", tmp_path / "own"
    for directory, text in ((place, "everybody's"), (own, "its own")):
        directory.mkdir()
        (directory / "file").write_text(text)
    command = network.inside("a", ["cat", str(place / "file")], {place: own})
    assert subprocess.run(command, capture_output=True, check=False).stdout == b"its own"
    assert (place / "file").read_text() == "everybody's"
    for name in ("a", "b"):
        listens(network, name)
    network.end("a")
    assert not network.processes("a")
    assert network.processes("b")


def test_nothing_is_left_of_a_network(may_have_networks: None) -> None:
    with Network(["a"]) as network:
        listens(network, "a")
        (process,) = network.processes("a")
        space = network.namespace("a")
    assert not process.is_running() or process.status() == "zombie"
    assert space not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_who_may_not_make_networks_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="run as root, install iproute2"):
        Network(["a"])


def test_rounds_become_medians_by_cell() -> None:
    def measured(tokens_per_s: float) -> dict[str, float]:
        return {
            "tokens_per_s": tokens_per_s,
            "latency_p50_s": 1.0,
            "latency_p99_s": 2.0,
            "ttft_p50_s": 0.5,
            "failures": 1,
        }

    def make(cell: str, number: int, tokens: float) -> Round:
        return Round(cell, number, "w", measured(tokens), {"replica-000": [number + 1, number + 2]}, {})

    one, two = summed([make("one", 0, 10), make("two", 0, 5), make("one", 1, 30), make("one", 2, 20)])
    assert one.numbers["tokens_per_s"] == 20
    assert one.line == ("one", "20.0 (10.0, 30.0, 20.0)", "1.00", "2.00", "0.50", "3", "1 to 4; -")
    assert two.line[0] == "two"


def test_tables_are_markdown() -> None:
    lines = str(Table("T", ("a", "b"), [(1, "x")])).splitlines()
    assert lines[-3:] == ["| a | b |", "| --- | --- |", "| 1 | x |"]
