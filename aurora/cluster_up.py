"""`aurora up` and `aurora down`: a Ray cluster of a checked file, with `aurora serve` in the background on its head.

Ray's own commands do the work: `ray up`, `ray exec` and `ray down`, over SSH. What runs on the head is one shell
command each, built here; --dry-run prints them.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from aurora.cluster_file import SOURCE, TOKEN, Cluster, load
from aurora.config import UserError

DEFAULT_FILE = Path("ray_cluster.yaml")
SHARED = "~/shared"
_WAIT_S = 1800  # for the nodes: a fresh machine installs for minutes
_STOP_S = 120
_SDKS = {"aws": "boto3", "gcp": "googleapiclient"}  # what Ray imports here to reach them

_BRANCH = {"serve": "server", "train": "trainer"}  # of the configuration, by role

Run = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class UpOptions:
    """What `aurora up` was told.

    replicas: engines; None: the serve nodes at the start. serve: further words of `aurora serve`.
    """

    file: Path | None = None
    dry_run: bool = False
    yes: bool = False
    shared: str = SHARED
    replicas: int | None = None
    serve: str = ""


@dataclass(frozen=True)
class DownOptions:
    file: Path | None = None
    yes: bool = False
    shared: str = SHARED


def run_command(command: Sequence[str]) -> int:
    """Run it in this terminal; its exit code."""
    return subprocess.run(command, check=False).returncode


def up(options: UpOptions, run: Run = run_command) -> int:
    """Bring the cluster up and start serving; returns the exit code. Raises UserError before anything has happened."""
    file = cluster_file(options.file)
    cluster = load(file, Path.cwd())
    replicas = _replicas(cluster, options.replicas)
    words = serve_words(cluster, options.shared, replicas, options.serve)
    commands = [
        [*ray_command("up"), *_yes(options.yes), str(file)],
        [*ray_command("exec"), str(file), start_command(run_dir(options.shared, cluster.name), options.shared, words)],
    ]
    obstacles = _obstacles(cluster)
    if options.dry_run:
        _describe(file, cluster, replicas, commands, obstacles)
        return 0
    if obstacles:
        raise UserError(f"{file}: {obstacles[0]}")
    _make_token()
    for command in commands:
        code = run(command)
        if code:
            print(f"aurora: `ray {command[1]}` ended with exit code {code}", file=sys.stderr)
            return 1
    print(f"aurora: it starts; `aurora logs {file} --follow` shows how, `ray attach {file} -p 8000` brings it here")
    return 0


def down(options: DownOptions, run: Run = run_command) -> int:
    """Stop serving, then the cluster; one that cannot be reached any more is ended all the same."""
    file = cluster_file(options.file)
    cluster = load(file, Path.cwd())
    stop = stop_command(run_dir(options.shared, cluster.name))
    stop_ray = f"{on_node(f'{SOURCE}/.venv/bin/ray')} stop"  # `ray down` looks for it in PATH, where it is not
    if run([*ray_command("exec"), str(file), f"{stop}; {stop_ray}"]):
        print("aurora: `aurora serve` could not be stopped in order; its cluster is ended now", file=sys.stderr)
    return 1 if run([*ray_command("down"), *_yes(options.yes), str(file)]) else 0


def cluster_file(file: Path | None) -> Path:
    """The file that is meant. Raises UserError where there is none."""
    if file is not None:
        return file
    if not DEFAULT_FILE.is_file():
        on_premise = Path(__file__).parent / "deploy" / "ray_on_premise.yaml"
        raise UserError(
            f"no {DEFAULT_FILE} in {Path.cwd()}: on this machine alone `aurora serve` is all you need; for a cluster "
            f"name its file, run this where Aurora's working tree is, or start from a copy of {on_premise}"
        )
    return DEFAULT_FILE


def run_dir(shared: str, cluster: str) -> str:
    """Where a cluster's drafters, checkpoints and log lie, as the nodes name it."""
    return f"{shared.rstrip('/')}/runs/{cluster}"


def serve_words(cluster: Cluster, shared: str, replicas: int, further: str) -> list[str]:
    """`aurora serve` and its flags, checked as `aurora serve` would check them. Raises UserError."""
    settings = {"cluster.wait_s": _WAIT_S} | {f"{_BRANCH[role]}.num_gpus": 1 for role in sorted(cluster.gpus)}
    try:
        mine = shlex.split(further)
    except ValueError as error:
        raise UserError(f"--serve {further}: {error}; quote it for the shell, once") from error
    model, flags = (mine[:1], mine[1:]) if mine and not mine[0].startswith("-") else ([], mine)
    fixed = ["--address", "auto", "--run-dir", run_dir(shared, cluster.name), "--replicas", str(replicas)]
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words = [*model, *fixed, *sets, *flags]
    _refuse_bad_flags(words)
    return ["serve", *words]


def start_command(directory: str, shared: str, words: Sequence[str]) -> str:
    """For the head's shell: end what serves there, then serve, with the log and the process's number in `directory`.

    The number is that of `aurora serve` itself: the shell that writes it becomes it.
    """
    log, pid = on_node(f"{directory}/serve.log"), on_node(f"{directory}/serve.pid")
    caches = f"XDG_CACHE_HOME={on_node(f'{shared}/cache')} HF_HOME={on_node(f'{shared}/huggingface')}"
    serve = " ".join(on_node(word) for word in words)
    inner = f"echo $$ > {pid}; exec .venv/bin/aurora {serve}"
    return (
        f"mkdir -p {on_node(directory)} && cd {on_node(SOURCE)} || exit 1; {stop_command(directory)}; "
        f"RAY_AUTH_MODE=token PYTHONUNBUFFERED=1 {caches} nohup setsid bash -c {shlex.quote(inner)} "
        f">> {log} 2>&1 < /dev/null & "
        f"for _ in $(seq 50); do [ -s {pid} ] && break; sleep 0.2; done; [ -s {pid} ]"
    )


def stop_command(directory: str) -> str:
    """For the head's shell: ask `aurora serve` to end, wait for it, and end it if it does not."""
    pid = on_node(f"{directory}/serve.pid")
    signal = f"pkill --pidfile {pid} --full 'aurora serve' --signal"
    wait = f'timeout {_STOP_S} tail --pid="$(cat {pid})" -f /dev/null'
    return f"if [ -s {pid} ] && {signal} TERM; then {wait} || {signal} KILL; fi; rm -f {pid}"


def on_node(word: str) -> str:
    """Quoted for a node's shell, where `~/` is that node's home."""
    return f'"$HOME"/{shlex.quote(word[2:])}' if word.startswith("~/") else shlex.quote(word)


def _replicas(cluster: Cluster, asked: int | None) -> int:
    least, most = cluster.nodes["serve"]
    replicas = least if asked is None else asked
    if not 1 <= replicas <= most:
        raise UserError(f"--replicas {replicas}: the file has {most} serve nodes at most; give 1 to {most}")
    return replicas


def _refuse_bad_flags(words: Sequence[str]) -> None:
    import argparse

    from aurora.options import add_config_options, read_config

    parser = argparse.ArgumentParser(prog="aurora up --serve", allow_abbrev=False)
    add_config_options(parser)
    read_config(*parser.parse_known_args(words))


def _obstacles(cluster: Cluster) -> list[str]:
    """What stands in the way on this machine, the file being right."""
    found = []
    if cluster.examples:
        listed = ", ".join(cluster.examples)
        found.append(f"provider: {listed}: for documents only (RFC 5737); put your machines' addresses there")
    module = _SDKS.get(cluster.provider)
    if module is not None and find_spec(module) is None:
        found.append(f"provider.type: {cluster.provider}: Ray needs the Python package {module} here; install it")
    return found


def _make_token() -> None:
    from aurora.ray_access import keep_private

    keep_private(Path(TOKEN).expanduser())


def _describe(file: Path, cluster: Cluster, replicas: int, commands: list[list[str]], obstacles: list[str]) -> None:
    counts = ", ".join(f"{_range(*bounds)} {role}" for role, bounds in cluster.nodes.items())
    print(f"{file}: cluster {cluster.name} ({cluster.provider}): head, {counts}; {replicas} replicas. Would run:")
    if not Path(TOKEN).expanduser().exists():
        print(f"  make Ray's token, {TOKEN}")
    for command in commands:
        print(f"  {shlex.join(['ray', *command[1:]])}")
    for note in (*obstacles, *cluster.notes):
        print(f"note: {note}")


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def ray_command(command: str) -> list[str]:
    """Ray's own command, of the environment that this one runs in."""
    return [str(Path(sys.executable).with_name("ray")), command]


def _yes(yes: bool) -> list[str]:
    return ["--yes"] if yes else []
