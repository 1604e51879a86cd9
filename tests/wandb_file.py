"""What lies in the file of an offline W&B run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(file: Path) -> Iterator[Any]:
    """The protobuf records of an offline run: LevelDB log blocks of 32 KiB behind a header of 7 bytes."""
    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows that were logged, in order; nested names are joined by `/`."""
    history = [record.history for record in records(file) if record.HasField("history")]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in each.item} for each in history]


def run_file(run_dir: Path) -> Path:
    """The file of the only offline run in `run_dir`."""
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return file
