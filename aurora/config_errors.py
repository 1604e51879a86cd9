"""What a configuration that is refused gets to hear: each key, what was given, and what may have been meant."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def explain(error: ValidationError, tree: type[BaseModel], file: Path | None) -> str:
    """All that is wrong, with key and value. tree: the model that was validated. file: what was read beside flags."""
    source = f" (flags over {file})" if file else ""
    problems = []
    wrong_inside = {item["loc"][:-1] for item in error.errors()}
    for item in error.errors():
        if item["type"] == "too_short" and item["loc"] in wrong_inside:
            continue  # its items were refused one by one
        key = ".".join(map(str, item["loc"])) or "configuration"
        given = f", got {item['input']!r}" if item["type"] != "extra_forbidden" and item["loc"] else ""
        problems.append(f"{key}: {_message(item, key, tree)}{given}")
    return "; ".join(problems) + source


def _message(item: "ErrorDetails", key: str, tree: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown(key, tree)
    if item["type"] in ("tuple_type", "list_type"):
        return "give a list, such as [a, b]"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"a section of keys; set one of them, such as {key}.KEY"
    return item["msg"]


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
