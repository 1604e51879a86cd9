"""Takes in a drafter's directory from elsewhere: nothing is published that a server would refuse, or that is not plain.

A directory is copied file by file, by name, and what was copied is checked: keys, shapes, types, finite values, the
vocabulary, and that it belongs to the target, which is given itself or by a version that is in use.
"""

import json
import shutil
from pathlib import Path

from aurora.store import READY, REJECTED, DrafterRefused
from drafters import draft_files, files
from drafters.target import TargetWeights

FILES = {
    "eagle3": ("config.json", "model.safetensors"),
    "model": (
        "config.json",
        draft_files.VOCABULARY,
        draft_files.INDEX,
        draft_files.TRAINED,
        draft_files.FROZEN,
    ),
}  # by kind of drafter
_PLAIN = (".json", ".safetensors")


def check_files(directory: Path, kind: str) -> None:
    """Raise DrafterRefused unless `directory` holds the files of a drafter, and only plain JSON and safetensors.

    No link is followed, nothing in a folder below is read, and no file refers to another place or to code.
    """
    if not directory.exists():
        raise DrafterRefused(f"{directory}: no such directory; give the directory of a drafter")
    if directory.is_symlink() or not directory.is_dir():
        raise DrafterRefused(f"{directory}: not a directory of its own; give the drafter's directory itself")
    for path in sorted(directory.iterdir()):
        if path.name in (READY, REJECTED):
            continue
        if path.is_symlink() or not path.is_file():
            raise DrafterRefused(f"{path}: only plain files are taken in; copy it with `cp -rL` and leave folders out")
        if path.suffix not in _PLAIN:
            raise DrafterRefused(f"{path}: only {' and '.join(_PLAIN)} files are taken in, never pickle or code")
    for name in FILES[kind]:
        if not (directory / name).is_file():
            raise DrafterRefused(
                f"{directory}: {name} is missing; a drafter of kind {kind} has {', '.join(FILES[kind])}"
            )
    _check_references(directory, kind)


def _check_references(directory: Path, kind: str) -> None:
    try:
        if "auto_map" in json.loads((directory / "config.json").read_text()):
            raise DrafterRefused(f"{directory / 'config.json'}: auto_map names code to run; remove it")
        if kind == "model":
            places = set(json.loads((directory / draft_files.INDEX).read_text())["weight_map"].values())
            odd = sorted(map(str, places - {draft_files.TRAINED, draft_files.FROZEN}))
            if odd:
                raise DrafterRefused(
                    f"{directory / draft_files.INDEX}: names {odd[0]!r}, which is no file of a drafter"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DrafterRefused):
            raise
        raise DrafterRefused(f"{directory}: its JSON files cannot be read ({error})") from error


def copy_files(source: Path, directory: Path, kind: str) -> None:
    """Copy the files of a drafter, and no other, into an existing directory."""
    for name in FILES[kind]:
        shutil.copyfile(source / name, directory / name, follow_symlinks=False)


def check_drafter(directory: Path, kind: str, target: TargetWeights | None, like: Path | None) -> None:
    """Raise DrafterRefused naming what a server of `target`, or one that runs the drafter in `like`, would refuse."""
    check_files(directory, kind)
    part = files if kind == "eagle3" else draft_files
    if target is not None:
        part.check_for(directory, target)
    if like is not None:
        part.check_like(directory, like)
