"""Machine code is never older than any of the sources that went into it."""

import ast
from pathlib import Path

import numba

import aurora
from aurora import compiled, goodput

_AURORA = Path(aurora.__file__).parent


def _imported(module: str) -> set[str]:
    """Modules of aurora that a module imports from."""
    tree = ast.parse((_AURORA / f"{module}.py").read_text())
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    return {name.removeprefix("aurora.") for name in names if name.startswith("aurora.")}


def test_what_is_compiled_and_what_it_takes_from_others_is_watched():
    users = {file.stem for file in _AURORA.glob("*.py") if "compiled" in _imported(file.stem)}
    assert users
    taken = set.union(*map(_imported, users)) - {"compiled"}
    assert users | taken == set(compiled.SOURCES)


def test_every_function_has_its_cache_there_and_others_keep_theirs():
    assert Path(goodput.most_goodput.stats.cache_path).is_relative_to(compiled._DIRECTORY)
    assert str(compiled._DIRECTORY) != numba.config.CACHE_DIR


def test_another_source_is_another_place(monkeypatch, tmp_path):
    for name in compiled.SOURCES:
        (tmp_path / f"{name}.py").write_text("A = 1\n")
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    before = compiled._directory()
    (tmp_path / "goodput.py").write_text("A = 2\n")
    assert compiled._directory() != before
