import os
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest
import ray

from aurora.config import AuroraConfig, UserError
from aurora.launch import _start_ray
from aurora.stop_signals import StopSignals


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the process's own signal handlers back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_ends_the_pause_before_a_restart_and_the_second_one_ends_the_process(handlers: None) -> None:
    asked: list[str] = []
    signals = StopSignals(lambda: asked.append("stop"), lambda: asked.append("kill"))
    signals.serving = True
    assert not signals.wait(0.01)
    assert not signals.received
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.wait(600), "returns at once"
    assert asked == ["stop"]
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == 128 + signal.SIGINT
    assert asked == ["stop"], "asked to stop once"


def test_what_is_not_served_yet_is_not_asked_to_stop(handlers: None) -> None:
    asked: list[str] = []
    signals = StopSignals(lambda: asked.append("stop"), lambda: asked.append("kill"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.wait(600)
    assert asked == ["kill"]


def test_a_ray_that_is_late_gets_another_try_and_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_worker_niceness"):
        monkeypatch.setenv(name, "")  # so that what is set below goes with it
    failures: list[BaseException | None] = []

    started: list[subprocess.Popen[bytes]] = []
    other = subprocess.Popen(["sleep", "600"])

    def init(*_: object, **__: object) -> None:
        failure = failures.pop(0)
        if failure is not None:
            started.append(subprocess.Popen(["sleep", "600"]))
            raise failure

    monkeypatch.setattr(ray, "init", init)
    late = Exception("The current node timed out during startup.")
    failures[:] = [late, late, None]
    _start_ray(AuroraConfig())
    assert failures == []
    assert len(started) == 2
    assert not any(psutil.pid_exists(process.pid) for process in started), "nothing of a late Ray is left"
    assert other.poll() is None, "a process that Ray did not start"
    other.kill()
    failures[:] = [late, late, late]
    with pytest.raises(UserError, match="Ray did not start; see"):
        _start_ray(AuroraConfig())
    failures[:] = [ValueError("a setting")]
    with pytest.raises(ValueError, match="a setting"):
        _start_ray(AuroraConfig())
    started.pop().kill()
