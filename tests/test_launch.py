import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from aurora.config import AuroraConfig, ServerConfig, SpeculationConfig, UserError
from aurora.launch import _first_drafter, _start_ray, serve
from aurora.run_directory import only_server_of
from aurora.start_notice import StartNotice
from aurora.stop_signals import StopSignals
from drafters import Eagle3Config, TargetWeights, initialise, save_drafter
from serve.listen import bind
from tests.tiny import DRAFT_VOCAB


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the process's own signal handlers back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_ends_the_pause_before_a_restart_and_the_second_one_ends_the_process(
    handlers: None, capfd: pytest.CaptureFixture[str]
) -> None:
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
    assert capfd.readouterr().err == (
        "aurora: stops once the open requests have ended; a second signal does not wait for them\n"
    )


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


def test_a_run_directory_has_one_server_at_a_time(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from aurora.run_directory import only_server_of\n"
    code += "with only_server_of(Path(sys.argv[1])): print('has it', flush=True); sys.stdin.read()"
    directory = tmp_path / "runs" / "first"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"has it\n"
        refused = pytest.raises(UserError, match=rf"--run-dir .*first: another `aurora serve` \(process {other.pid}\)")
        with refused, only_server_of(directory):
            pass
        other.kill()  # however it ends, the next one may have it
        other.wait()
    for _ in range(2):
        with only_server_of(directory):
            assert int((directory / ".serving").read_text()) == os.getpid()


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match=r"--run-dir .*file/run: Not a directory; give a directory")
    with refused, only_server_of(tmp_path / "file" / "run"):
        pass


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` sets of the environment goes with the test; no file of a token is made."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of this test")


@pytest.mark.usefixtures("token")
def test_a_taken_port_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        config = AuroraConfig(run_dir=tmp_path / "run", server=ServerConfig(port=port))
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose"):
            serve(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("token")
def test_a_first_drafter_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    given = SpeculationConfig(drafter=tmp_path / "mine")
    config = AuroraConfig(run_dir=tmp_path / "run", server=ServerConfig(port=0), speculation=given)
    with pytest.raises(UserError, match=r"--drafter .*mine: no config.json there; give a drafter's directory"):
        serve(config)
    assert not config.run_dir.exists()


@pytest.mark.usefixtures("token")
def test_a_first_drafter_of_another_model_is_refused_before_ray_starts(
    tmp_path: Path, target: TargetWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora.launch._serve", lambda *_: 0)
    (drafter := tmp_path / "mine").mkdir()
    save_drafter(initialise(target, Eagle3Config.for_target(target.config, DRAFT_VOCAB), seed=0), drafter, 3, target)
    given = {"model": target.name, "run_dir": tmp_path / "run", "server": ServerConfig(port=0)}
    config = AuroraConfig(**given, speculation=SpeculationConfig(drafter=drafter))
    assert serve(config) == 0
    file = drafter / "config.json"
    file.write_text(file.read_text().replace('"hidden_size": ', '"hidden_size": 9'))
    with pytest.raises(UserError, match=r"--drafter: .*mine/config.json: hidden_size is 9.*, the target needs"):
        serve(config)


def test_a_first_drafter_that_comes_too_late_is_left_aside_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "drafters" / "v000001").mkdir(parents=True)
    config = AuroraConfig(run_dir=tmp_path, speculation=SpeculationConfig(drafter=tmp_path / "mine"))
    with pytest.raises(UserError):
        _first_drafter(config)
    (config.store_dir / "v000001" / "READY").touch()
    assert _first_drafter(config) is None
    assert f"mine is left aside: {config.store_dir} has versions" in caplog.text


def test_a_long_start_says_every_half_minute_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    notice = StartNotice(lambda: now[0])
    for now[0] in (10.0, 29.0, 31.0, 45.0, 59.0, 62.0):
        notice.look()
    assert capsys.readouterr().out.splitlines() == [
        "aurora: still starting after 31 s",
        "aurora: still starting after 62 s",
    ]
    assert notice.rest_s == 30.0
