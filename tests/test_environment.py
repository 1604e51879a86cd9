import errno
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from aurora import environment, machine
from aurora import machine_checks as checks
from aurora.cli import main
from aurora.config import AuroraConfig
from aurora.environment import Finding, diagnose, engine_environment, kv_cache_bytes


@pytest.fixture(autouse=True)
def cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_NO_USAGE_STATS", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {4, 5, 6, 9})


def test_threads_are_bound_to_the_cores_that_the_process_may_use() -> None:
    assert engine_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "4-6,9"
    assert engine_environment([4, 5])["VLLM_CPU_OMP_THREADS_BIND"] == "4-5"
    assert engine_environment([4])["VLLM_CPU_OMP_THREADS_BIND"] == "4"


def test_weights_lie_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_environment()["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert "THP_MEM_ALLOC_ENABLE" not in engine_environment()


def test_what_the_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "5")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_environment()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")
    assert engine_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "4-6,9"


def test_libraries_are_preloaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "find_iomp", lambda: tmp_path / "libiomp5.so")
    monkeypatch.setattr(environment, "find_tcmalloc", lambda: tmp_path / "libtcmalloc_minimal.so.4")
    both = f"{tmp_path}/libtcmalloc_minimal.so.4:{tmp_path}/libiomp5.so"
    assert engine_environment()["LD_PRELOAD"] == both
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    assert engine_environment()["LD_PRELOAD"] == f"{both}:/lib/other.so"
    monkeypatch.setenv("LD_PRELOAD", both)
    assert "LD_PRELOAD" not in engine_environment()


def test_nothing_is_preloaded_where_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_iomp", lambda: None)
    monkeypatch.setattr(environment, "find_tcmalloc", lambda: None)
    assert "LD_PRELOAD" not in engine_environment()


def test_a_gpu_gets_no_cpu_settings_and_the_first_model_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROCESSING_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    assert engine_environment() == {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    }


def test_the_tcmalloc_of_the_wheel_comes_before_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundled, system = tmp_path / "libs", tmp_path / "system"
    monkeypatch.setattr(environment, "_tcmalloc_dirs", lambda: [bundled, system])
    assert environment.find_tcmalloc() is None
    for folder in (system, bundled):
        folder.mkdir()
        (folder / "libtcmalloc_minimal.so.4").touch()
        assert environment.find_tcmalloc() == folder / "libtcmalloc_minimal.so.4"


@pytest.mark.parametrize(("gib", "cache"), [(0, 0), (2, 0.5), (15, 3.75), (16, 4), (500, 4)])
def test_the_kv_cache_is_a_quarter_of_what_is_free(gib: int, cache: float) -> None:
    assert kv_cache_bytes(gib << 30) == cache * (1 << 30)


def test_a_container_limit_bounds_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    free = environment.available_memory()
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert environment.available_memory() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert environment.available_memory() == pytest.approx(free, rel=0.5)


def test_the_diagnosis_has_a_remedy_for_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    monkeypatch.setattr(environment, "find_iomp", lambda: None)
    monkeypatch.setattr(environment, "find_tcmalloc", lambda: None)
    findings = {finding.name: finding for finding in diagnose()}
    for name in ("torch", "vllm", "ray", "wandb"):
        assert findings[name].fatal
        assert "make install" in findings[name].remedy
    assert "libtcmalloc-minimal4" in findings["tcmalloc"].remedy
    assert not findings["tcmalloc"].fatal


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["doctor", *arguments])
    return code, capsys.readouterr().out


def test_doctor_fails_when_serving_would(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "examine", lambda _config: [])
    monkeypatch.setattr(environment, "diagnose", lambda: [Finding("vllm", "missing", "run `make install`", fatal=True)])
    code, said = doctor(capsys)
    assert code == 1
    assert "run `make install`" in said
    monkeypatch.setattr(environment, "diagnose", lambda: [Finding("tcmalloc", "missing", "optional")])
    code, said = doctor(capsys, "--json")
    assert code == 0
    assert json.loads(said) == [{"name": "tcmalloc", "value": "missing", "remedy": "optional", "fatal": False}]


def test_doctor_looks_at_this_machine_with_the_flags_of_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = doctor(capsys, "--json", "--port", str(port), "--run-dir", str(tmp_path / "not/yet"))
    found = {finding["name"]: finding for finding in json.loads(said)}
    assert code == 1
    assert found["port"]["fatal"]
    assert f"127.0.0.1:{port} is taken" in found["port"]["value"]
    assert str(tmp_path) in found["run_dir disk"]["value"]
    assert found.keys() >= {"threads", "load", "open files", "/dev/shm", "swap", "clock", "W&B", "Ray processes"}
    _, said = doctor(capsys, "--json", "--port", "0")
    assert {f["name"]: f for f in json.loads(said)}["port"]["value"] == "any"


GIB = 1 << 30
CONFIG = AuroraConfig()
HERE = Path("/srv/run")
WELL = {
    "threads": checks.threads(4, None, 3),
    "as many threads": checks.threads(4, "4", 1),
    "no quota": checks.quota(4, "max 100000"),
    "no cgroup": checks.quota(4, None),
    "quota of all": checks.quota(4, "400000 100000"),
    "load": checks.load(4, 6.0),
    "governor": checks.governor(["performance"]),
    "no governor": checks.governor([]),
    "madvise": checks.huge_pages("always [madvise] never"),
    "no huge pages to see": checks.huge_pages(None),
    "swap": checks.swap(0, "1"),
    "files": checks.open_files(65536),
    "files without end": checks.open_files(-1),
    "shm": checks.shared_memory(2 * GIB),
    "no shm to see": checks.shared_memory(None),
    "disk": checks.disk("run_dir", HERE, GIB, GIB),
    "memory": checks.memory(64 * GIB, GIB, CONFIG),
    "port": checks.port("::1", 8000, None),
    "Ray": checks.other_ray([], "me"),
    "own Ray": checks.ray_address(None, None, None),
    "asked for": checks.ray_address("10.0.0.1:6379", None, "auto"),
    "offline": checks.wandb_login("offline", False),
    "online": checks.wandb_login("online", True),
    "clock": checks.clock(2.0, 1.0, True),
    "no NTP to see": checks.clock(2.0, 1.0, None),
    "CPU build": checks.engine_build(False, None, None, True),
    "GPU build": checks.engine_build(True, "12.8", "13.0", False),
}
ILL = {
    "OMP": (checks.threads(4, "8", 1), "OMP_NUM_THREADS", False),
    "trainer": (checks.threads(4, None, 4), "--trainer-threads 3", False),
    "quota": (checks.quota(4, "150000 100000"), "pin it to 1 cores", False),
    "load": (checks.load(2, 3.1), "end what else computes", False),
    "governor": (checks.governor(["performance", "powersave"]), "cpupower", False),
    "never": (checks.huge_pages("always madvise [never]"), "echo madvise", False),
    "overcommit": (checks.swap(0, "2"), "vm.overcommit_memory=0", False),
    "swapped": (checks.swap(2 * GIB, "0"), "swapoff", False),
    "files": (checks.open_files(1024), "ulimit -n", False),
    "shm": (checks.shared_memory(64 << 20), "--shm-size", False),
    "disk": (checks.disk("run_dir", HERE, GIB - 1, GIB), "free 1.0 GiB at /srv/run", False),
    "memory": (checks.memory(4 * GIB, 2 * GIB, CONFIG), "trainer.replay_mib", False),
    "no memory": (checks.memory(4 * GIB, 5 * GIB, CONFIG), "smaller model", True),
    "taken": (checks.port("127.0.0.1", 80, errno.EADDRINUSE), "another --port", True),
    "not ours": (checks.port("127.0.0.1", 80, errno.EACCES), "another --port", True),
    "my Ray": (checks.other_ray([(7, "raylet", "me"), (8, "raylet", "you")], "me"), "kill 7", False),
    "your Ray": (checks.other_ray([(8, "raylet", "you")], "me"), "ask their users", False),
    "RAY_ADDRESS": (checks.ray_address("10.0.0.1:6379", None, None), "unset RAY_ADDRESS", True),
    "ray start": (checks.ray_address(None, "10.0.0.1:6379", None), "ray stop", False),
    "no key": (checks.wandb_login("online", False), "wandb login", True),
    "slow clock": (checks.clock(1.0, 2.0, True), "timedatectl", False),
    "no NTP": (checks.clock(2.0, 1.0, False), "timedatectl", False),
    "no GPU": (checks.engine_build(False, "12.8", None, False), "EXTRA=cpu", True),
    "CPU engine on a GPU": (checks.engine_build(True, None, "13.0", True), "EXTRA=gpu", False),
    "CPU torch": (checks.engine_build(True, None, "13.0", False), "EXTRA=gpu", True),
    "old driver": (checks.engine_build(True, "13.0", "12.4", False), "newer driver", True),
}


@pytest.mark.parametrize("case", WELL)
def test_what_is_well_needs_no_remedy(case: str) -> None:
    assert (WELL[case].remedy, WELL[case].fatal) == ("", False)


@pytest.mark.parametrize("case", ILL)
def test_what_is_wrong_has_a_remedy(case: str) -> None:
    finding, remedy, fatal = ILL[case]
    assert remedy in finding.remedy
    assert finding.fatal == fatal


def test_ray_of_a_server_that_runs_is_not_left_over(tmp_path: Path) -> None:
    raylet = tmp_path / "raylet"
    shutil.copy("/bin/sleep", raylet)
    script = f"{raylet} 60 & echo $!; wait"
    with (
        subprocess.Popen(["/bin/sh", "-c", script, "/venv/bin/aurora", "serve"], stdout=subprocess.PIPE) as server,
        subprocess.Popen([raylet, "60"]) as stray,
    ):
        assert server.stdout is not None
        below = int(server.stdout.readline())
        try:
            found = {pid for pid, _, _ in machine._ray_processes()}
        finally:
            os.kill(below, signal.SIGTERM)
            stray.terminate()
    assert stray.pid in found
    assert below not in found


def test_a_key_for_wandb_is_found_without_wandb(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password key\n")
    file.chmod(0o600)
    assert machine.has_wandb_key({"WANDB_API_KEY": "x"})
    assert machine.has_wandb_key({"NETRC": str(file)})
    assert not machine.has_wandb_key({"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not machine.has_wandb_key({"NETRC": str(tmp_path / "none")})


def test_torchs_cuda_is_read_without_torch() -> None:
    import torch

    assert machine.torch_cuda() == torch.version.cuda
