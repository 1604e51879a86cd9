from pathlib import Path

import pytest

from aurora import environment
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


def test_doctor_fails_when_serving_would(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from aurora.cli import main

    monkeypatch.setattr(environment, "diagnose", lambda: [Finding("vllm", "missing", "run `make install`", fatal=True)])
    assert main(["doctor"]) == 1
    assert "run `make install`" in capsys.readouterr().out
    monkeypatch.setattr(environment, "diagnose", lambda: [Finding("tcmalloc", "missing", "optional")])
    assert main(["doctor"]) == 0
