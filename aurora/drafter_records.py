"""What a run directory's drafter store says of its versions: plain values; no tensor is read.

`DrafterStore` makes the directory it is given; looking at a store must not, so `open_store` asks for one that is there.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora.config import UserError
from aurora.store import READY, REJECTED, DrafterRefused, DrafterStore

KINDS = {"eagle3": "drafters", "model": "draft_models"}  # kind -> folder in the run directory
LATEST, OLDER, IS_REJECTED, DAMAGED = "latest", "older", "rejected", "damaged"


@dataclass(frozen=True)
class VersionRecord:
    """One version, as its publisher and whoever rejected it left it. None: the publisher did not say."""

    number: int
    state: str  # latest: what servers of this run directory use; older; rejected; damaged
    reason: str  # why it was rejected or cannot be read
    published_s: float  # wall-clock time
    size: int  # bytes of its files
    parent: int | None
    origin: str  # of a version that no gate judged: where it came from
    trainer_step: int | None
    tokens_trained: int | None
    gate_acceptance: float | None  # acceptance length on held-back requests
    parent_acceptance: float | None  # the parent's on the same


def open_store(run_dir: Path, kind: str) -> DrafterStore:
    """The store of a run directory. Raises UserError where there is none, or none that can be read."""
    root = run_dir.expanduser() / KINDS[kind]
    if not root.is_dir():
        other = [k for k, folder in KINDS.items() if (run_dir.expanduser() / folder).is_dir()]
        hint = f"there are drafters of --kind {other[0]}" if other else "give the --run-dir of a server"
        raise UserError(f"--run-dir {run_dir}: no drafters of kind {kind} in it; {hint}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"--run-dir {run_dir}: {root} cannot be read by this user")
    return DrafterStore(root)


def version_dir(store: DrafterStore, number: int) -> Path:
    """Where a version lies, readable or not."""
    return store.root / f"v{number:06d}"


def records(store: DrafterStore) -> list[VersionRecord]:
    """Every published version, ascending. One that is removed meanwhile is left out."""
    latest = store.latest()
    found = (_record(store, number, latest) for number in store.versions())
    return [record for record in found if record is not None]


def _record(store: DrafterStore, number: int, latest: int | None) -> VersionRecord | None:
    path = version_dir(store, number)
    try:
        published_s = (path / READY).stat().st_mtime
        size = sum(file.stat().st_size for file in path.iterdir() if file.name not in (READY, REJECTED))
        reason = _rejection(path)
    except OSError:
        return None
    state = LATEST if number == latest else OLDER if reason is None else IS_REJECTED
    metadata: dict[str, Any] = {}
    try:
        metadata = store.read(number).metadata
    except DrafterRefused as error:
        state, reason = DAMAGED, str(error)
    return VersionRecord(
        number=number,
        state=state,
        reason=reason or "",
        published_s=published_s,
        size=size,
        parent=_number(metadata.get("parent")),
        origin=str(metadata.get("origin") or ""),
        trainer_step=_number(metadata.get("trainer_step")),
        tokens_trained=_number(metadata.get("tokens_trained")),
        gate_acceptance=_decimal(metadata.get("acceptance_length")),
        parent_acceptance=_decimal(metadata.get("parent_acceptance_length")),
    )


def _rejection(path: Path) -> str | None:
    """Why a version was rejected, None if it was not; a full disk keeps the mark without the reason."""
    mark = path / REJECTED
    return (mark.read_text(errors="replace").strip() or "no reason was kept") if mark.exists() else None


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _decimal(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def check_number(store: DrafterStore, number: int) -> None:
    """Raise UserError naming the versions that exist unless `number` is one of them."""
    numbers = store.versions()
    if number not in numbers:
        there = ", ".join(map(str, numbers)) or "none yet"
        raise UserError(f"version {number}: not in {store.root}; there are {there}")
