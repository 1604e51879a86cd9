import shutil
from pathlib import Path

import pytest

from aurora.cli import main
from aurora.config import UserError
from aurora.logs import LocalLogs, LogsOptions, run, session_logs
from aurora.run_directory import link_logs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log directory of a session of Ray's."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    directory = tmp_path / "ray" / "session_1" / "logs"
    directory.mkdir(parents=True)
    (tmp_path / "ray" / "session_latest").symlink_to("session_1")
    return directory


def write(directory: Path, name: str, actor: str, text: str) -> Path:
    file = directory / f"worker-{name}.err"
    file.write_text(f":job_id:01000000\n:actor_name:{actor}\n{text}")
    return file


def test_only_actors_are_read_and_each_line_says_whose_it_is(ray: Path, tmp_path: Path) -> None:
    write(ray, "a", "Server", "one\ntwo\n")
    write(ray, "b", "Trainer", "step\n")
    (ray / "worker-idle.err").write_text("a worker without an actor\n")
    (ray / "raylet.err").write_text("Ray's own\n")
    serve_log = tmp_path / "serve.log"
    serve_log.write_text("answers\n")
    assert LocalLogs(session_logs(tmp_path), serve_log, 10).poll() == [
        "aurora | answers",
        "server | one",
        "server | two",
        "trainer | step",
    ]


def test_what_is_added_comes_once_and_whole(ray: Path, tmp_path: Path) -> None:
    server = write(ray, "a", "Server", "1\n2\n3\nhalf")
    logs = LocalLogs(session_logs(tmp_path), tmp_path / "none.log", 2)
    assert logs.poll() == ["server | 2", "server | 3"]
    assert logs.poll() == []
    with server.open("a") as file:
        file.write(" done\nnext\n")
    write(ray, "b", "Server", "restarted\n")
    assert logs.poll() == ["server | half done", "server | next", "server | restarted"]
    server.write_text("anew\n")
    assert logs.poll() == ["server | anew"]


def test_a_worker_that_becomes_an_actor_is_read_from_then_on(ray: Path, tmp_path: Path) -> None:
    file = ray / "worker-a.out"
    file.write_text("")
    logs = LocalLogs(session_logs(tmp_path), tmp_path / "none.log", 5)
    assert logs.poll() == []
    file.write_text(":job_id:01000000\n:actor_name:Reporter\nhere\n")
    assert logs.poll() == ["reporter | here"]


def test_the_command_prints_them(ray: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(ray, "a", "Server", "1\n2\n3\n")
    assert main(["logs", "--lines", "2", "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "server | 2\nserver | 3\n"


def test_of_two_servers_that_of_the_run_directory_is_shown(ray: Path, tmp_path: Path) -> None:
    write(ray, "a", "Server", "the newest session's\n")
    mine, run_dir = tmp_path / "ray" / "session_0" / "logs", tmp_path / "run"
    mine.mkdir(parents=True)
    run_dir.mkdir()
    write(mine, "b", "Server", "mine\n")
    for _ in range(2):  # a server that starts again
        link_logs(run_dir, mine)
    assert LocalLogs(session_logs(run_dir), run_dir / "serve.log", 9).poll() == ["server | mine"]
    shutil.rmtree(mine)
    assert session_logs(run_dir) == tmp_path / "ray" / "session_latest" / "logs", "the link leads nowhere"


def test_where_there_is_nothing_to_show_it_is_said(ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no actor of Aurora's has written there yet"):
        run(LogsOptions(run_dir=tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="no Ray session on this machine"):
        run(LogsOptions(run_dir=tmp_path))
    with pytest.raises(UserError, match="--lines 0"):
        LogsOptions(lines=0)


@pytest.mark.parametrize(
    ("follow", "tail"), [(False, "tail --lines=7 "), (True, "tail --follow=name --retry --lines=7 ")]
)
def test_those_of_a_cluster_come_from_its_head(follow: bool, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands: list[list[str]] = []
    file = Path("ray_cluster.yaml")
    assert run(LogsOptions(file=file, follow=follow, lines=7), lambda command: commands.append([*command]) or 0) == 0
    assert commands[0][1:] == ["exec", "ray_cluster.yaml", f'{tail}"$HOME"/shared/runs/aurora/serve.log']
    assert run(LogsOptions(file=file), lambda command: 1) == 1
