import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from aurora import cluster_up
from aurora.cli import main
from aurora.cluster_up import DownOptions, UpOptions, down, start_command, stop_command, up
from aurora.config import UserError
from aurora.node_roles import await_roles
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
ON_PREMISE = ROOT / "aurora" / "deploy" / "ray_on_premise.yaml"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the on-premise file with addresses that are nobody's example, and a home of its own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text(ON_PREMISE.read_text().replace("192.0.2.", "10.9.8."))
    return file


class Runs:
    """Stands in for the terminal: keeps what would be run and answers with the exit codes that it is given."""

    def __init__(self, *codes: int) -> None:
        self.commands: list[list[str]] = []
        self._codes = [*codes]

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append([*command])
        return self._codes.pop(0) if self._codes else 0


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("aurora: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("file", ["ray_cluster.yaml", "aurora/deploy/ray_on_premise.yaml"])
def test_a_dry_run_of_each_shipped_file_says_what_would_be_done_and_does_nothing(
    file: str, mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_up, "run_command", lambda command: pytest.fail(f"{command} was run"))
    assert main(["up", "--dry-run", file]) == 0
    said = capsys.readouterr().out
    assert f"ray up {file}" in said
    assert "make Ray's token" in said
    assert "aurora serve --address auto" in said
    assert not (mine.parent / ".ray").exists()


def test_without_a_file_the_one_of_this_directory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["up", "--dry-run"]) == 0
    assert "ray_cluster.yaml: cluster aurora" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    for command in ("up", "down"):
        said = fails(capsys, command)
        assert "no ray_cluster.yaml" in said
        assert "aurora serve" in said
        assert Path(said.split()[-1]).is_file()


def test_a_bad_file_ends_with_exit_code_2(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine.write_text(mine.read_text().replace("RAY_AUTH_MODE=token", ""))
    for command in (["up", "--dry-run"], ["up"], ["down"], ["logs"]):
        said = fails(capsys, *command, str(mine))
        assert f"{mine}: head_start_ray_commands: " in said
        assert "put RAY_AUTH_MODE=token" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--replicas", "3"], "--replicas 3: the file has 2 serve nodes at most"),
        (["--replicas", "0"], "--replicas 0"),
        (["--serve", "--k-max 99"], "k_max"),
        (["--serve", "org/model --worker-cls x"], "--worker-cls"),
        (["--serve", "'unclosed"], "--serve 'unclosed"),
    ],
)
def test_bad_flags_are_refused_before_anything_happens(
    arguments: list[str], says: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(capsys, "up", str(mine), *arguments)


def test_example_addresses_are_not_reached_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"192\.0\.2\.10.*put your machines' addresses there"):
        up(UpOptions(file=ON_PREMISE), Runs())


def test_a_provider_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cluster_up, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="boto3"):
        up(UpOptions(), Runs())


def test_up_makes_the_token_then_the_cluster_then_serves(mine: Path) -> None:
    runs = Runs()
    assert up(UpOptions(file=mine, yes=True, serve="org/model --k-max 6"), runs) == 0
    token = mine.parent / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    ray_up, ray_exec = runs.commands
    assert ray_up[1:] == ["up", "--yes", str(mine)]
    assert ray_exec[1:3] == ["exec", str(mine)]
    assert "aurora serve org/model --address auto" in ray_exec[3]
    assert "--replicas 2 " in ray_exec[3]
    assert "--k-max 6" in ray_exec[3]
    assert Path(ray_up[0]).is_file()


def test_nothing_is_served_on_a_cluster_that_did_not_come_up(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(1)
    assert up(UpOptions(file=mine), runs) == 1
    assert len(runs.commands) == 1
    assert "`ray up` ended with exit code 1" in capsys.readouterr().err


def test_down_ends_serving_first_and_the_cluster_whatever_came_of_that(mine: Path) -> None:
    for codes, result in (((0, 0), 0), ((1, 0), 0), ((0, 1), 1)):
        runs = Runs(*codes)
        assert down(DownOptions(file=mine, yes=True), runs) == result
        assert [command[1] for command in runs.commands] == ["exec", "down"]
        assert runs.commands[0][3].endswith('; "$HOME"/aurora/.venv/bin/ray stop')
        assert runs.commands[1][2:] == ["--yes", str(mine)]


SERVE = """#!/bin/bash
echo "aurora $* with $RAY_AUTH_MODE in $XDG_CACHE_HOME"
trap 'echo ended; exit 0' TERM
while :; do sleep 0.1 & wait $!; done
"""


class Node:
    """A home directory with the tree that a head has, and a shell in it. Its `aurora` only waits for SIGTERM."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run_dir = home / "my shared" / "runs" / "c"
        aurora = home / "aurora" / ".venv" / "bin" / "aurora"
        aurora.parent.mkdir(parents=True)
        aurora.write_text(SERVE)
        aurora.chmod(0o755)

    def shell(self, command: str) -> int:
        env = {**os.environ, "HOME": str(self.home)}
        return subprocess.run(["bash", "-c", command], env=env, check=False, timeout=300).returncode

    def log(self) -> str:
        return (self.run_dir / "serve.log").read_text()

    def pid(self) -> int:
        return int((self.run_dir / "serve.pid").read_text())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.shell(stop_command("~/my shared/runs/c"))


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_serving_starts_in_the_background_and_ends_in_order(node: Node) -> None:
    start = start_command("~/my shared/runs/c", "~/my shared", ["serve", "a model", "--set", "x=~/y"])
    assert node.shell(start) == 0
    wait_until(lambda: "aurora" in node.log(), 120, "it did not start")
    assert node.log() == f"aurora serve a model --set x=~/y with token in {node.home}/my shared/cache\n"
    first = node.pid()
    assert node.shell(start) == 0, "a second time it takes the place of the first"
    wait_until(lambda: node.log().count("aurora serve") == 2, 120, "it did not start again")
    assert "ended" in node.log()
    assert not alive(first)
    second = node.pid()
    assert alive(second)
    assert node.shell(stop_command("~/my shared/runs/c")) == 0
    assert not alive(second)
    assert not (node.run_dir / "serve.pid").exists()
    assert node.shell(stop_command("~/my shared/runs/c")) == 0, "there is nothing to stop"


def test_the_number_of_another_process_is_left_alone(node: Node) -> None:
    node.run_dir.mkdir(parents=True)
    other = subprocess.Popen(["sleep", "60"])
    (node.run_dir / "serve.pid").write_text(str(other.pid))
    assert node.shell(stop_command("~/my shared/runs/c")) == 0
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_start_without_the_working_tree_fails(node: Node) -> None:
    (node.home / "aurora").rename(node.home / "elsewhere")
    assert node.shell(start_command("~/my shared/runs/c", "~/my shared", ["serve"])) != 0
    assert not (node.run_dir / "serve.pid").exists()


def test_roles_are_waited_for_as_long_as_was_said() -> None:
    time = [0.0]

    def pause(seconds: float) -> None:
        time[0] += seconds

    def resources() -> dict[str, float]:
        return {"CPU": 8, "serve": 1.0 * (time[0] >= 10), "train": 1.0 * (time[0] >= 50)}

    await_roles(["serve"], resources, 30, lambda: time[0], pause)
    assert 10 <= time[0] < 20
    with pytest.raises(UserError, match="no node with the resource train joined within 30 s"):
        await_roles(["serve", "train"], resources, 30, lambda: time[0], pause)
    before = time[0]
    await_roles(["nobody"], resources, 0, lambda: time[0], pause)
    assert time[0] == before


def test_a_head_without_a_gpu_says_nothing_of_the_engines_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from aurora import deployment, environment
    from aurora.config import load_config

    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    here = deployment._engine_environment(load_config(None, {}), 0)
    there = deployment._engine_environment(load_config(None, {"cluster.address": "auto"}), 0)
    assert "VLLM_CPU_OMP_THREADS_BIND" in here
    assert "VLLM_CPU_OMP_THREADS_BIND" not in there
    assert there["VLLM_USE_V2_MODEL_RUNNER"] == "0"
