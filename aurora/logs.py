"""`aurora logs`: what the actors of a deployment wrote, and what `aurora serve` printed.

On this machine those are Ray's own files, to which RUN_DIR/logs is a link, and `serve.log` in the run directory where
there is one. On a cluster the head's `serve.log` has the actors' lines of every node, too.
"""

import os
import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from aurora.cluster_file import load
from aurora.cluster_up import SHARED, Run, on_node, ray_command, run_command, run_dir
from aurora.config import UserError, require_positive
from aurora.run_directory import LOGS

_POLL_S = 0.5
_HEAD_BYTES = 4096  # Ray names the actor in the first lines
_ACTOR = re.compile(r"^:actor_name:(\S+)$", re.MULTILINE)
_MARK = re.compile(r"^:(job_id|actor_name|task_name):")


@dataclass(frozen=True)
class LogsOptions:
    """What `aurora logs` was told. Without `file` it is about this machine; `lines`: of each file, to begin with."""

    file: Path | None = None
    follow: bool = False
    lines: int = 100
    run_dir: Path = Path("runs/default")
    shared: str = SHARED

    def __post_init__(self) -> None:
        require_positive(self, "lines")


def run(options: LogsOptions, run: Run = run_command) -> int:
    """Print the logs, and with `follow` what is added to them until Ctrl-C; returns the exit code. Raises UserError."""
    if options.file is not None:
        return _cluster_logs(options, options.file, run)
    logs = LocalLogs(session_logs(options.run_dir), options.run_dir / "serve.log", options.lines)
    found = logs.poll()
    if not found and not options.follow:
        raise UserError(f"{logs.directory}: no actor of Aurora's has written there yet; is `aurora serve` running?")
    print(*found, sep="\n", flush=True)
    while options.follow:
        time.sleep(_POLL_S)  # files tell nobody when they grow
        for line in logs.poll():
            print(line, flush=True)
    return 0


def session_logs(run_dir: Path) -> Path:
    """Where the newest server of a run directory logs, or else this machine's newest Ray session.

    Raises UserError where there is neither.
    """
    if (run_dir / LOGS).is_dir():
        return run_dir / LOGS
    directory = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")  # noqa: S108 - Ray's place
    if not directory.is_dir():
        raise UserError(f"{directory}: no Ray session on this machine; start `aurora serve`, or name a cluster's file")
    return directory


class LocalLogs:
    """Actors' files of one directory and one further file, read from where the last `poll` ended.

    Each line is preceded by its source: `server | ...`. A line that is not yet complete waits for its end.
    """

    def __init__(self, directory: Path, serve_log: Path, lines: int) -> None:
        self.directory = directory
        self._serve_log = serve_log
        self._lines = lines
        self._ends: dict[Path, int] = {}
        self._actors: dict[Path, str] = {}

    def poll(self) -> list[str]:
        """Lines that were added; of a file that is new to us the last ones."""
        return [line for path, source in self._sources() for line in self._read(path, source)]

    def _sources(self) -> list[tuple[Path, str]]:
        for path in sorted(self.directory.glob("worker-*.*")):
            if path not in self._actors and (name := _actor_of(path)):
                self._actors[path] = name.lower()
        serve = [(self._serve_log, "aurora")] if self._serve_log.is_file() else []
        return [*serve, *self._actors.items()]

    def _read(self, path: Path, source: str) -> list[str]:
        fresh: deque[str] = deque(maxlen=None if path in self._ends else self._lines)
        end = self._ends.get(path, 0)
        if path.stat().st_size < end:
            end = 0  # it was begun anew
        with path.open("rb") as file:
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                text = line.decode(errors="replace").rstrip()
                if not _MARK.match(text):
                    fresh.append(f"{source} | {text}")
        self._ends[path] = end
        return list(fresh)


def _actor_of(path: Path) -> str | None:
    with path.open("rb") as file:
        found = _ACTOR.search(file.read(_HEAD_BYTES).decode(errors="replace"))
    return found[1] if found else None


def _cluster_logs(options: LogsOptions, file: Path, run: Run) -> int:
    cluster = load(file, Path.cwd())
    log = on_node(f"{run_dir(options.shared, cluster.name)}/serve.log")
    follow = "--follow=name --retry " if options.follow else ""
    return 1 if run([*ray_command("exec"), str(file), f"tail {follow}--lines={options.lines} {log}"]) else 0
