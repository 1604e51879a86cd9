"""The trainer's own state on disk: one safetensors file, replaced as a whole, so that a reader never sees half of it.

It holds the drafter, Adam's moments and step counts, the token counts that the draft vocabulary is chosen from, and, in
the file's metadata, the counters as JSON and a checksum of it all. The replay is not kept: after a restart it fills up
again from live traffic.
"""

import json
import os
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from drafters.checksum import checksum
from drafters.target import TargetWeights

FILE = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
SAVE_ERRORS = (OSError, SafetensorError)  # of a disk that is full or gone


class Learning(Protocol):
    """A drafter in training (`trainer.learner.Learner`, `trainer.draft_model.DraftModelLearner`)."""

    steps: int
    tokens: int
    optimizer: torch.optim.AdamW

    @property
    def model(self) -> nn.Module: ...
    @property
    def target(self) -> TargetWeights: ...
    def reload(self) -> None: ...


class CheckpointRefused(ValueError):
    """A checkpoint that cannot be resumed from; the message names the file and the reason."""


def save_checkpoint(directory: Path, learner: Learning, emitted_counts: Tensor) -> Path:
    """Write the state of `learner` and the counts [V]; returns the file. The older one stays valid until then.

    Raises one of SAVE_ERRORS when the disk does not take it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in learner.model.state_dict().items()}
    for name, parameter in learner.model.named_parameters():
        for moment, value in learner.optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value
    tensors["emitted_counts"] = emitted_counts
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    counters = json.dumps({"steps": learner.steps, "tokens": learner.tokens, "target": learner.target.fingerprint})
    metadata = {"trainer": counters, "checksum": checksum(sorted(own.items()), counters)}
    staging, final = directory / f".{FILE}", directory / FILE
    try:
        save_file(own, staging, metadata=metadata)
        _flush(staging)
        staging.replace(final)
    except BaseException:
        staging.unlink(missing_ok=True)  # a full disk has no room for half of one
        raise
    _flush(directory)
    return final


def load_checkpoint(directory: Path, learner: Learning) -> Tensor | None:
    """Put a checkpoint's state into `learner`; returns its token counts [V], or None when there is no checkpoint.

    Raises CheckpointRefused, with `learner` unchanged, for a file that is damaged or belongs to another target or size.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        if checksum(sorted(tensors.items()), metadata["trainer"]) != metadata["checksum"]:
            raise ValueError("its bytes are not those that were written")
        counters = json.loads(metadata["trainer"])
        counts: Tensor = tensors.pop("emitted_counts")
        steps, tokens, fingerprint = int(counters["steps"]), int(counters["tokens"]), counters["target"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointRefused(
            f"{path}: damaged ({error}); remove it to start from the newest drafter version"
        ) from error
    _check(path, tensors, fingerprint, learner)
    _restore(learner, tensors)
    learner.steps, learner.tokens = steps, tokens
    return counts


def _check(path: Path, tensors: dict[str, Tensor], fingerprint: str, learner: Learning) -> None:
    if fingerprint != learner.target.fingerprint:
        raise CheckpointRefused(f"{path}: of another target model; remove it or give another --run-dir")
    for name, tensor in learner.model.state_dict().items():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != tensor.shape:
            found = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
            raise CheckpointRefused(f"{path}: {name} is {found}, not {tuple(tensor.shape)}; remove the checkpoint")


def _restore(learner: Learning, tensors: dict[str, Tensor]) -> None:
    learner.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in learner.model.named_parameters():
        moments = {m: tensors[f"{m}.{name}"] for m in _MOMENTS if f"{m}.{name}" in tensors}
        if moments:
            learner.optimizer.state[parameter] = {
                m: v if m == "step" else v.to(device=parameter.device) for m, v in moments.items()
            }
    learner.reload()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
