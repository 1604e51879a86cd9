"""`aurora drafters`: what a run directory's store holds, and the four things that change or copy it.

A rollback acts through the store alone: versions that are marked rejected are never the latest, and a running server
keeps the latest in its engine (`serve.feedback.swap_forever` looks once a second), its trainer likewise.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora.config import UserError
from aurora.drafter_records import (
    IS_REJECTED,
    KINDS,
    LATEST,
    OLDER,
    check_number,
    open_store,
    records,
    version_dir,
)
from aurora.store import REJECTED, DrafterRefused, DrafterStore, DrafterVersion

if TYPE_CHECKING:
    from drafters.target import TargetWeights

_PUBLISH_TRIES = 3


@dataclass(frozen=True)
class StoreOptions:
    """Which store. Raises UserError, when it is opened, for one that is not there."""

    run_dir: Path
    kind: str = "eagle3"

    def open(self) -> DrafterStore:
        return open_store(self.run_dir, self.kind)


@contextmanager
def _refusals_are_the_users() -> Iterator[None]:
    """What a server would refuse is an error of whoever asked for it here."""
    try:
        yield
    except DrafterRefused as error:
        raise UserError(str(error)) from error


def listed(options: StoreOptions, live: dict[int, float | None] | None = None) -> list[dict[str, Any]]:
    """Every version as plain values; `live`: acceptance length of those that drafted, as a server counted it."""
    found = records(options.open())
    return [{**asdict(record), "live_acceptance": (live or {}).get(record.number)} for record in found]


def described(options: StoreOptions, number: int) -> dict[str, Any]:
    """All that is known of one version; `damage` is empty if its files are those that were published."""
    store = options.open()
    check_number(store, number)
    (record,) = (r for r in records(store) if r.number == number)
    version, damage = _verified(store, number)
    path = version_dir(store, number)
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        config, damage = None, damage or f"{path / 'config.json'}: {error}"
    return {
        **asdict(record),
        "path": str(path),
        "damage": damage,
        "digests": version.digests if version else {},
        "metadata": version.metadata if version else {},
        "config": config,
    }


def _verified(store: DrafterStore, number: int) -> tuple[DrafterVersion | None, str]:
    try:
        return store.verify(number), ""
    except DrafterRefused as error:
        return None, str(error)


def difference(options: StoreOptions, first: int, second: int) -> dict[str, Any]:
    """What changed from one version to another: metadata, tensors, vocabulary. Raises UserError for damaged ones."""
    from drafters.compare import compare

    store = options.open()
    for number in (first, second):
        check_number(store, number)
    with _refusals_are_the_users():
        a, b = store.verify(first), store.verify(second)
        found = compare(a.path, b.path)
    keys = sorted(a.metadata.keys() | b.metadata.keys())
    return {
        "first": first,
        "second": second,
        "metadata": {k: [a.metadata.get(k), b.metadata.get(k)] for k in keys if a.metadata.get(k) != b.metadata.get(k)},
        **asdict(found),
    }


def rollback_target(options: StoreOptions, number: int | None) -> tuple[int, list[int]]:
    """The version to go back to (default: the one before the latest) and those that a rollback takes out of use.

    Raises UserError for a version that is not there, is rejected or damaged, or is the latest already.
    """
    store = options.open()
    found = records(store)
    usable = [record.number for record in found if record.state in (LATEST, OLDER)]
    latest = store.latest()
    if number is None:
        older = [n for n in usable if n < (latest or 0)]
        if not older:
            raise UserError(f"{store.root}: nothing to go back to; usable versions: {_all(usable)}")
        number = older[-1]
    check_number(store, number)
    if number not in usable:
        (record,) = (r for r in found if r.number == number)
        raise UserError(f"version {number}: {record.state} ({record.reason}); choose one of {_all(usable)}")
    if number == latest:
        raise UserError(f"version {number}: the latest already; choose one of {_all(usable[:-1])}")
    with _refusals_are_the_users():
        store.verify(number)
    return number, [r.number for r in found if r.number > number and r.state != IS_REJECTED]


def _all(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def roll_back(options: StoreOptions, number: int, reason: str) -> list[int]:
    """Reject every version above `number`, also those published meanwhile; returns them. Raises UserError."""
    store = options.open()
    taken: list[int] = []
    while (latest := store.latest()) is not None and latest > number:
        store.reject(latest, reason)
        if not (version_dir(store, latest) / REJECTED).exists():
            raise UserError(f"version {latest}: {store.root} takes no mark; run it as the server's user, or make room")
        taken.append(latest)
    return taken


def export(options: StoreOptions, number: int, directory: Path) -> Path:
    """Copy a version into a new directory, which appears whole, for stock `vllm serve`. Raises UserError."""
    store = options.open()
    check_number(store, number)
    directory = directory.expanduser().absolute()
    if directory.exists() or directory.is_symlink():
        raise UserError(f"{directory}: is there already; give a new directory")
    if not directory.parent.is_dir():
        raise UserError(f"{directory}: no directory {directory.parent}; create it first")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; give a directory that can be written") from error
    try:
        with _refusals_are_the_users():
            version = store.verify(number)
            for name in version.digests:
                shutil.copyfile(version.path / name, staging / name)
        staging.chmod(0o755)
        staging.rename(directory)
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; nothing was exported") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def take_in(options: StoreOptions, directory: Path, model: str | None, cache_dir: Path) -> DrafterVersion:
    """Check a drafter from elsewhere and publish it as the next version. Raises UserError for what is not sound.

    Without `model` the newest usable version says what the target is; with both, both are asked.
    """
    from drafters.intake import check_drafter, check_files, copy_files

    source = directory.expanduser()
    root = options.run_dir.expanduser() / KINDS[options.kind]
    with _refusals_are_the_users():
        check_files(source, options.kind)
        store = DrafterStore(root) if model is not None and not root.exists() else options.open()
        like = _in_use(store)
        if like is None and model is None:
            raise UserError(f"{store.root}: no usable version that says what the target is; give --model")
        target = _target(model, cache_dir) if model is not None else None

        def write(staging: Path) -> None:
            copy_files(source, staging, options.kind)
            try:
                check_drafter(staging, options.kind, target, like.path if like is not None else None)
            except DrafterRefused as error:  # the copy is gone when this is read
                raise DrafterRefused(str(error).replace(str(staging), str(source))) from error

        parent = like.number if like is not None else None
        metadata = {
            "parent": parent,
            "origin": f"imported from {source.absolute()}",
            "trainer_step": 0,
            "tokens_trained": 0,
        }
        return _published(lambda: store.publish(write, metadata), store)


def _published(publish: Callable[[], DrafterVersion], store: DrafterStore) -> DrafterVersion:
    """Publish; tried again when the trainer, which clears up after dead writers, took the half-written copy away."""
    for tried in range(1, _PUBLISH_TRIES + 1):
        try:
            return publish()
        except FileNotFoundError as error:
            if tried == _PUBLISH_TRIES:
                raise UserError(f"{store.root}: {error}; try again") from error
        except OSError as error:
            raise UserError(f"{store.root}: {error.strerror}; nothing was published") from error
    raise AssertionError("unreachable")


def _in_use(store: DrafterStore) -> DrafterVersion | None:
    """The newest usable version that is undamaged."""
    for record in reversed(records(store)):
        if record.state in (LATEST, OLDER):
            version, damage = _verified(store, record.number)
            if not damage:
                return version
    return None


def _target(model: str, cache_dir: Path) -> "TargetWeights":
    from aurora.default_model import model_directory, resolve_model
    from drafters.target import TargetWeights

    try:
        return TargetWeights.load(model_directory(resolve_model(model, cache_dir)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--model {model}: {error}") from error


def confirmed(question: str, yes: bool) -> bool:
    """Whether the user agrees. Raises UserError where nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody can be asked here; say --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
