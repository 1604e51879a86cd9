"""A draft model's directory: a plain Hugging Face `LlamaForCausalLM`, which `transformers` and stock vLLM load.

The trained tensors lie in a small shard of their own; embedding and head, the target's, in another that versions of one
store share by hard link, so that publishing writes little. `draft_vocab.json`, which others ignore, holds the ids of
the tokens to draft; the key `aurora` in `config.json` the target's fingerprint.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aurora.config import SpeculationConfig
from aurora.store import DrafterRefused, DrafterStore, DrafterVersion, sha256_file
from drafters.draft_model import DraftModel, DraftModelConfig
from drafters.files import REMEDY, compare_config, read_tensors
from drafters.initialise import newest_or
from drafters.target import TargetWeights, read_layers
from drafters.vocab import choose

FROZEN = "frozen.safetensors"
TRAINED = "trained.safetensors"
INDEX = "model.safetensors.index.json"
VOCABULARY = "draft_vocab.json"
_PREFIX = "model."


def initialise_draft_model(target: TargetWeights, layers: int, draft_vocab: int) -> DraftModel:
    """A draft model made of `layers` layers of the target, evenly spread from its first to its last."""
    config = DraftModelConfig.for_target(target.config, layers)
    ids = choose(torch.zeros(config.vocab_size), draft_vocab, target.special_ids).to(target.embed_tokens.device)
    model = DraftModel(config, target, ids)
    taken = read_layers(Path(target.name), _spread(target.config["num_hidden_layers"], layers))
    state = {f"layers.{i}.{name}": weight for i, layer in enumerate(taken) for name, weight in layer.items()}
    model.copy_from({**state, "norm.weight": target.norm, "draft_ids": ids})
    return model


def _spread(available: int, wanted: int) -> tuple[int, ...]:
    return tuple(round(i * (available - 1) / max(wanted - 1, 1)) for i in range(wanted))


def save_draft_model(model: DraftModel, directory: Path, target: TargetWeights, frozen: Path | None = None) -> None:
    """Write `model` into an existing directory, in float32. `frozen`: another version's shard of that name to share."""
    trained = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in _trained(model)}
    save_file(trained, directory / TRAINED, metadata={"format": "pt"})
    _share(frozen, directory / FROZEN) if frozen is not None else _save_frozen(model, directory / FROZEN)
    places = dict.fromkeys(trained, TRAINED) | dict.fromkeys(_frozen(model), FROZEN)
    index = {"metadata": {}, "weight_map": places}
    ids: list[int] = model.draft_ids.tolist()
    config = _hugging_face(model.config, target)
    for name, content in ((INDEX, index), (VOCABULARY, ids), ("config.json", config)):
        (directory / name).write_text(json.dumps(content, indent=None if content is ids else 2) + "\n")


def _trained(model: DraftModel) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def _frozen(model: DraftModel) -> dict[str, Tensor]:
    head = {} if model.config.tied else {"lm_head.weight": model.lm_head}
    return {"model.embed_tokens.weight": model.embed_tokens, **head}


def _save_frozen(model: DraftModel, path: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _frozen(model).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _share(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # a file system without links
        shutil.copyfile(source, path)


def _hugging_face(config: DraftModelConfig, target: TargetWeights) -> dict[str, Any]:
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        **config.hugging_face(config.num_hidden_layers, config.tied),
        "torch_dtype": "float32",
        **{name: target.config[name] for name in special if name in target.config},
        "aurora": {"target_fingerprint": target.fingerprint},
    }


def load_draft_model(directory: Path, target: TargetWeights) -> DraftModel:
    """The draft model in `directory` between `target`'s embedding and head, which are not read from there.

    Raises DrafterRefused naming the file or key that is wrong: keys, shapes, types, non-finite values, another target.
    """
    config = _read_config(directory, target)
    model = DraftModel(config, target, _read_vocabulary(directory, config))
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(directory / TRAINED).items()}
    _check_tensors(tensors, {name: parameter.shape for name, parameter in _trained(model)}, directory / TRAINED)
    model.copy_from({**tensors, "draft_ids": model.draft_ids})
    return model


def check_for(directory: Path, target: TargetWeights) -> None:
    """Check a draft model from elsewhere, its copy of embedding and head included. Raises DrafterRefused."""
    frozen = _frozen(load_draft_model(directory, target))
    found = read_tensors(directory / FROZEN)
    if found.keys() != frozen.keys() or not all(torch.equal(found[name], frozen[name].cpu()) for name in frozen):
        raise DrafterRefused(f"{directory / FROZEN}: not the embedding and head of {target.name}; {REMEDY}")


def check_like(directory: Path, like: Path) -> None:
    """Check a draft model against one of the same target that is in use. Raises DrafterRefused."""
    path = directory / "config.json"
    try:
        found, known = (json.loads((folder / "config.json").read_text()) for folder in (directory, like))
        layers = int(known["num_hidden_layers"])
        config = DraftModelConfig.for_target({**known, "num_hidden_layers": layers + 1}, layers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DrafterRefused(f"{path}: not a draft model ({error}); {REMEDY}") from error
    compare_config(path, found, known)
    _read_vocabulary(directory, config)
    shapes = {name: tensor.shape for name, tensor in read_tensors(like / TRAINED).items()}
    _check_tensors(read_tensors(directory / TRAINED), shapes, directory / TRAINED)
    if sha256_file(directory / FROZEN) != sha256_file(like / FROZEN):
        raise DrafterRefused(f"{directory / FROZEN}: not the embedding and head of the target of {like}; {REMEDY}")


def _check_tensors(tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size], path: Path) -> None:
    odd = sorted(tensors.keys() ^ shapes.keys())
    if odd:
        raise DrafterRefused(f"{path}: key {odd[0]!r} is {'unknown' if odd[0] in tensors else 'missing'}; {REMEDY}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.is_floating_point():
            raise DrafterRefused(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {shapes[name]}; {REMEDY}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise DrafterRefused(f"{path}: {name} holds values that are not finite; {REMEDY}")


def _read_config(directory: Path, target: TargetWeights) -> DraftModelConfig:
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text())
        config = DraftModelConfig.for_target(target.config, int(found["num_hidden_layers"]))
        wanted = _hugging_face(config, target)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DrafterRefused(f"{path}: not a draft model ({error}); {REMEDY}") from error
    compare_config(path, found, wanted)
    return config


def _read_vocabulary(directory: Path, config: DraftModelConfig) -> Tensor:
    path = directory / VOCABULARY
    try:
        ids = torch.tensor(json.loads(path.read_text()), dtype=torch.int64)
        sane = ids.dim() == 1 and len(ids) > 0 and bool((ids.diff() > 0).all())
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise DrafterRefused(f"{path}: not a list of token ids ({error}); {REMEDY}") from error
    if not sane or int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size:
        raise DrafterRefused(f"{path}: not ascending ids of the target's vocabulary; {REMEDY}")
    return ids


def ensure_draft_model(store: DrafterStore, target: TargetWeights, speculation: SpeculationConfig) -> DrafterVersion:
    """The newest sound version in `store`; an empty store first gets the one made of the target's layers.

    Processes that start together may all call it. Raises DrafterRefused when what is there does not belong to the
    target, ValueError for a target that is too small.
    """

    def publish_first() -> DrafterVersion:
        model = initialise_draft_model(target, speculation.draft_layers, speculation.draft_vocab)
        metadata = {"parent": None, "origin": "layers of the target", "trainer_step": 0, "tokens_trained": 0}
        return store.publish(lambda directory: save_draft_model(model, directory, target), metadata)

    return newest_or(
        store,
        publish_first,
        belongs=lambda directory: _read_config(directory, target),
        sound=lambda directory: load_draft_model(directory, target),
    )
