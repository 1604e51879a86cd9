import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILES = sorted((ROOT / "aurora" / "deploy" / "docker").glob("Dockerfile.*"))


def hadolint(file: Path) -> str:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert tool is not None, "hadolint is missing: install the extra dev"
    command = [tool, "--no-color", "--failure-threshold", "style", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (result.stdout == "")
    return result.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.suffix)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    assert hadolint(file) == ""


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && sudo pip install x\n")
    assert {"DL3006", "DL3004"} <= set(hadolint(tmp_path / "Dockerfile").replace(":", " ").split())


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.suffix)
def test_an_image_is_small_safe_and_watched(file: Path) -> None:
    lines = [line.strip() for line in file.read_text().splitlines()]
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert f"RUN BESIDE=default-model scripts/install {file.suffix[1:]}" in lines
    assert lines.index("USER 1000:1000") > max(i for i, line in enumerate(lines) if line.startswith(("RUN", "COPY")))
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    assert "/health" in file.read_text()
    assert not any(line.startswith(("ARG", "ENV")) and ("KEY" in line or "TOKEN" in line) for line in lines)


def gets_in(path: str) -> bool:
    """Whether .dockerignore lets a file of the working tree into the build; the last pattern that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if not pattern or pattern.startswith("#"):
            continue
        names = {path, *map(str, Path(path).parents)}
        if any(fnmatch(name, each) for name in names for each in (pattern, pattern.removeprefix("**/"))):
            ignored = not line.startswith("!")
    return not ignored


def test_the_build_gets_what_it_needs_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = ["pyproject.toml", "scripts/install", "overrides-cpu.txt", project["readme"], *project["license-files"]]
    needed += ["constraints-cpu.txt", "constraints-gpu.txt"]
    needed += [f"{package}/__init__.py" for package in ("aurora", "drafters", "serve", "trainer")]
    assert [path for path in needed if not gets_in(path)] == []
    other = [".git/config", ".env", "keys.txt", "runs/default/wandb/x", ".venv/bin/python", "tests/tiny.py"]
    assert [path for path in [*other, "aurora/__pycache__/cli.pyc"] if gets_in(path)] == []
