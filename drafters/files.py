"""A drafter's directory in the format of the `speculators` library: `config.json` and `model.safetensors`.

Stock `vllm serve TARGET --speculative-config '{"method": "eagle3", "model": DIRECTORY, ...}'` loads it. The key
`aurora` in `config.json`, which others ignore, holds the target's fingerprint, so that a drafter of another model of
the same size is refused.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora.store import DrafterRefused
from drafters.config import Eagle3Config, default_aux_layers, read_target_config
from drafters.eagle3 import Eagle3
from drafters.target import TargetWeights
from drafters.vocab import to_mask

REMEDY = "give a drafter trained for this target, or remove it to start from the target's own weights"


def save_drafter(model: Eagle3, directory: Path, speculative_tokens: int, target: TargetWeights) -> None:
    """Write `model` into an existing directory; float32, every tensor in storage of its own."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = _speculators_config(model.config, speculative_tokens, target.fingerprint)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _speculators_config(config: Eagle3Config, speculative_tokens: int, fingerprint: str) -> dict[str, Any]:
    proposal = {"proposal_type": "greedy", "speculative_tokens": speculative_tokens}
    verifier = {"name_or_path": config.target_name, "architectures": list(config.target_architectures)}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "transformer_layer_config": config.hugging_face(layers=1),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layer_ids),
        "torch_dtype": "float32",
        "aurora": {"target_fingerprint": fingerprint},
    }


def load_drafter(directory: Path, target: TargetWeights) -> Eagle3:
    """The drafter in `directory`, bound to `target`'s embedding.

    Raises DrafterRefused naming the file or key that is wrong: keys, shapes, types, non-finite values, another target.
    """
    config = _check_config(directory, target.config, target.name, target.fingerprint)
    tensors = read_tensors(directory / "model.safetensors")
    _check_tensors(tensors, config, directory / "model.safetensors")
    model = Eagle3(config, target.embed_tokens)
    model.load_state_dict(tensors)
    return model


def check_directory(directory: Path, target_dir: Path) -> Eagle3Config:
    """Check only `config.json` of a drafter against its target's; reads no tensor. Raises DrafterRefused."""
    return _check_config(directory, read_target_config(target_dir), str(target_dir), None)


def check_tensors(directory: Path, target_dir: Path) -> None:
    """Check a drafter's tensors against its config. Raises DrafterRefused as `load_drafter` does."""
    path = directory / "model.safetensors"
    _check_tensors(read_tensors(path), check_directory(directory, target_dir), path)


def check_for(directory: Path, target: TargetWeights) -> None:
    """Check a drafter from elsewhere against its target. Raises DrafterRefused as `load_drafter` does."""
    load_drafter(directory, target)


def check_like(directory: Path, like: Path) -> None:
    """Check a drafter against one of the same target that is in use. Raises DrafterRefused as `load_drafter` does.

    What a server that runs `like` cannot exchange without a restart, the size of the draft vocabulary, must be equal.
    """
    try:
        known = json.loads((like / "config.json").read_text())
        layers = known["eagle_aux_hidden_state_layer_ids"][-1] + 3  # of the target: see `default_aux_layers`
        target = {**known["transformer_layer_config"], "num_hidden_layers": layers}
        name = known["speculators_config"]["verifier"]["name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DrafterRefused(f"{like}: its config.json says nothing of the target ({error})") from error
    config = _check_config(directory, target, name, known.get("aurora", {}).get("target_fingerprint"))
    path = directory / "model.safetensors"
    _check_tensors(read_tensors(path), config, path)
    if config.draft_vocab_size != known["draft_vocab_size"]:
        raise DrafterRefused(
            f"{directory / 'config.json'}: draft_vocab_size is {config.draft_vocab_size}, the drafter in use has "
            f"{known['draft_vocab_size']}; start a server of its own for it"
        )


def _check_config(directory: Path, target: dict[str, Any], target_name: str, fingerprint: str | None) -> Eagle3Config:
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text())
        config = Eagle3Config.for_target(target, found["draft_vocab_size"], target_name)
        wanted = _speculators_config(config, 1, fingerprint or "")
        marked = found.get("aurora", {}).get("target_fingerprint")
        layer = {**found["transformer_layer_config"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DrafterRefused(f"{path}: not an EAGLE-3 drafter in speculators format ({what}); {REMEDY}") from error
    optional = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}
    compare_config(path, {**optional, "head_dim": config.head_dim, **layer}, wanted["transformer_layer_config"])
    tapped = {"eagle_aux_hidden_state_layer_ids": list(default_aux_layers(target["num_hidden_layers"]))}
    plain = {"fc_norm": False, "norm_before_fc": False, "norm_output": False, "norm_before_residual": False}
    defaults = {**plain, **tapped, "target_hidden_size": config.hidden_size, "norm_before_residual": True}
    wanted = {**plain, **tapped, "speculators_model_type": "eagle3", "target_hidden_size": config.hidden_size}
    compare_config(path, {**defaults, **found}, wanted)
    if fingerprint and marked and marked != fingerprint:
        raise DrafterRefused(f"{path}: this drafter was trained for another model than {target_name}; {REMEDY}")
    return config


def compare_config(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise DrafterRefused for the first key of `wanted` that `found` holds with another value."""
    for key, value in wanted.items():
        if key == "max_position_embeddings":
            continue
        given = found.get(key)
        near = isinstance(value, float) and isinstance(given, int | float) and abs(given - value) <= 1e-6 * abs(value)
        if given != value and not near:
            raise DrafterRefused(f"{path}: {key} is {given!r}, the target needs {value!r}; {REMEDY}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a drafter's file. Raises DrafterRefused when it cannot be read."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DrafterRefused(f"{path}: not readable: {error}; {REMEDY}") from error
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def _check_tensors(tensors: dict[str, Tensor], config: Eagle3Config, path: Path) -> None:
    shapes = config.shapes()
    odd = sorted(tensors.keys() ^ shapes.keys())
    if odd:
        raise DrafterRefused(f"{path}: key {odd[0]!r} is {'unknown' if odd[0] in tensors else 'missing'}; {REMEDY}")
    for name, tensor in tensors.items():
        kind = {"d2t": tensor.dtype == torch.int64, "t2d": tensor.dtype == torch.bool}
        if tuple(tensor.shape) != shapes[name]:
            raise DrafterRefused(f"{path}: {name} has shape {tuple(tensor.shape)}, not {shapes[name]}; {REMEDY}")
        if not kind.get(name, tensor.is_floating_point()):
            raise DrafterRefused(f"{path}: {name} has type {tensor.dtype}; {REMEDY}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DrafterRefused(f"{path}: {name} holds values that are not finite; {REMEDY}")
    ids = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    sane = bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < config.vocab_size
    if not sane or not torch.equal(tensors["t2d"], to_mask(ids, config.vocab_size)):
        raise DrafterRefused(f"{path}: d2t and t2d do not describe ascending ids of one vocabulary; {REMEDY}")
