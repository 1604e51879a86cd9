"""Each engine on a machine has cores of its own, as long as there are enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora import environment
from serve import cores as module
from serve.cores import CoreClaim, claim_cores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four cores, no GPU, and an environment of its own."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {8, 9, 10, 11})
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")


@given(st.lists(st.integers(1, 4), max_size=6), st.integers(1, 8))
def test_no_core_is_claimed_twice_until_too_few_are_free(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], cores: int
) -> None:
    directory, free = tmp_path_factory.mktemp("locks"), set(range(cores))
    claims = []
    for count in counts:
        claims.append(CoreClaim(count, range(cores), directory))
        got = set(claims[-1].cores)
        if count > len(free):
            assert got == set(range(cores))
        else:
            assert len(got) == count
            assert got <= free
            free -= got
    for claim in claims:
        claim.release()
    assert CoreClaim(cores, range(cores), directory).cores == list(range(cores))


def test_what_a_process_had_is_free_when_it_ends(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from serve.cores import CoreClaim\n"
    code += "print(CoreClaim(1, [0, 1], Path(sys.argv[1])).cores, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == b"[0]\n"
        assert CoreClaim(1, [0, 1], tmp_path).cores == [1]
        other.kill()
    assert CoreClaim(2, [0, 1], tmp_path).cores == [0, 1]


def test_without_locks_all_cores_are_shared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert CoreClaim(1, [0, 1], tmp_path / "file" / "locks").cores == [0, 1]
    assert "0 of the 1 cores that server.num_cpus wants are to be had in" in caplog.text
    (tmp_path / "0").symlink_to(tmp_path / "another's")
    assert CoreClaim(1, [0, 1], tmp_path).cores == [1]
    assert not (tmp_path / "another's").exists()


def test_servers_of_two_cores_each_are_bound_apart(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = claim_cores(2.0)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "8-9"
    assert claim_cores(2.0) is None, "it is bound already"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")
    second = claim_cores(2.0)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "10-11"
    assert (first.cores, second.cores) == ([8, 9], [10, 11])


@pytest.mark.parametrize("num_cpus", [None, 4.0, 64.0])
def test_who_has_the_machine_leaves_the_binding_to_vllm(machine: None, num_cpus: float | None) -> None:
    assert claim_cores(num_cpus) is None
    assert not os.environ["VLLM_CPU_OMP_THREADS_BIND"]
