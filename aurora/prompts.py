"""Prompts from a JSONL file or from a data set that the `datasets` library can load."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora.config import UserError

Row = tuple[str, dict[str, Any]]  # (where it stands, its columns)


@dataclass(frozen=True)
class Conversation:
    """The user's side of one conversation; each turn is one request."""

    turns: tuple[str, ...]  # at least one
    domain: str = ""


def read_prompts(
    dataset: str,
    *,
    split: str = "train",
    variant: str | None = None,
    domain: str | None = None,
    limit: int | None = None,
) -> list[Conversation]:
    """Conversations of `dataset` in its order: those of one variant and domain if these are given, at most `limit`.

    dataset: a .json/.jsonl file, or what `datasets.load_dataset` takes (hub name or directory; then `split` counts).
    Every row is checked before any is used. Raises UserError naming the file and line, or the filter that fits no row.
    """
    rows = [(row, _conversation(where, row)) for where, row in _rows(dataset, split)]
    if not rows:
        raise UserError(f"data set {dataset}: no rows; give one with a `prompt` or `turns` in each row")
    wanted = {"variant": variant, "domain": domain}
    for column, value in wanted.items():
        if value is not None:
            kept = [r for r in rows if r[0].get(column) == value]
            if not kept:
                present = sorted({str(row.get(column)) for row, _ in rows} - {"None"})
                raise UserError(
                    f"--{column} {value}: no row of {dataset} has it; choose one of {', '.join(present) or 'none'}"
                )
            rows = kept
    return [conversation for _, conversation in rows[:limit]]


def _rows(dataset: str, split: str) -> Iterable[Row]:
    path = Path(dataset).expanduser()
    if path.is_file():
        return _jsonl_rows(path)
    if path.is_dir() or not _looks_like_file(dataset):
        return _library_rows(str(path), split)
    raise UserError(f"data set file {dataset}: no such file; give a .jsonl file or the name of a data set")


def _looks_like_file(dataset: str) -> bool:
    return dataset.endswith((".json", ".jsonl")) or dataset.startswith((".", "/", "~"))


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{bad}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"data set file {path}: {error.strerror}; give a readable .jsonl file") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parse(f"{path}:{number}", line)


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        fault = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise UserError(f"{where}: not JSON: {fault}; write one object a line") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply; write one flat object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object; write one object a line")
    return row


def _library_rows(name: str, split: str) -> Iterator[Row]:
    import datasets  # takes seconds to load

    try:
        loaded = datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        raise UserError(
            f"data set {name}: neither a file here nor in the local cache, and the hub does not answer ({error}); "
            "give a .jsonl file or go online"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        remedy = "check the name and --split, or give a .jsonl file"
        raise UserError(f"data set {name}, split {split}: {reason.rstrip('.')}; {remedy}") from error
    for number, row in enumerate(loaded):
        yield f"{name}[{split}] row {number}", dict(row)


def _conversation(where: str, row: dict[str, Any]) -> Conversation:
    turns = row.get("turns")
    prompt = row.get("prompt")
    if turns is None and prompt is None:
        raise UserError(f"{where}: neither `prompt` nor `turns`; each row needs one of them")
    if turns is None:
        turns = [prompt]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
        field = "prompt" if row.get("turns") is None else "turns"
        expected = "a non-empty string" if field == "prompt" else "a list of non-empty strings"
        raise UserError(f"{where}: `{field}` must be {expected}, got {str(row[field])[:40]!r}")
    return Conversation(tuple(turns), str(row.get("domain") or ""))
