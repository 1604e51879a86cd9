"""What a configuration that is refused gets to hear: each key, what was given, and what may have been meant."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, tree: type[BaseModel], file: Path | None) -> str:
    """All that is wrong, with key and value. tree: the model that was validated. file: what was read beside flags."""
    source = f" (flags over {file})" if file else ""
    problems = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"])) or "configuration"
        given = f", got {item['input']!r}" if item["type"] != "extra_forbidden" and item["loc"] else ""
        message = _unknown(key, tree) if item["type"] == "extra_forbidden" else item["msg"]
        problems.append(f"{key}: {message}{given}")
    return "; ".join(problems) + source


def _unknown(key: str, tree: type[BaseModel]) -> str:
    keys, leaf = list(_keys(tree)), key.rpartition(".")[2]
    near = [k for k in keys if k.rpartition(".")[2] == leaf] or get_close_matches(key, keys, 1, 0.8)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown key; {hint}see `aurora config show`"


def _keys(branch: type[BaseModel], path: str = "") -> Iterator[str]:
    """Dotted names of every branch and leaf."""
    for name, field in branch.model_fields.items():
        yield path + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{path}{name}.")
