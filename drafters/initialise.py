"""Day 0: a drafter made from its target, so that it has something to build on before the first trace.

The layer is the target's last decoder layer; it reads the highest tapped state (`fc` starts as the identity on it) and
its head rows are the target's. Only what the target has no counterpart for, the embedding half of the projections and
the lower tapped states, starts as small noise drawn from `seed`.
"""

import fcntl
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aurora.config import SpeculationConfig
from aurora.store import DrafterRefused, DrafterStore, DrafterVersion
from drafters.config import Eagle3Config
from drafters.eagle3 import Eagle3
from drafters.files import check_directory, check_tensors, load_drafter, save_drafter
from drafters.target import TargetWeights
from drafters.vocab import choose, to_mask, to_offsets

log = logging.getLogger(__name__)

_NOISE = 0.02  # standard deviation, as in the target family's own initialisation


def initialise(target: TargetWeights, config: Eagle3Config, seed: int) -> Eagle3:
    """A drafter for `target`, the same for the same seed."""
    model = Eagle3(config, target.embed_tokens)
    ids = choose(torch.zeros(config.vocab_size), config.draft_vocab_size, target.special_ids)
    generator = torch.Generator().manual_seed(seed)
    state = {
        "fc.weight": _beside_noise(torch.eye(config.hidden_size), 2 * config.hidden_size, generator),
        **_layer_weights(target, config, generator),
        "norm.weight": target.norm,
        "lm_head.weight": target.lm_head[ids],
        "d2t": to_offsets(ids),
        "t2d": to_mask(ids, config.vocab_size),
    }
    model.load_state_dict(state)
    return model


def _layer_weights(target: TargetWeights, config: Eagle3Config, generator: torch.Generator) -> dict[str, Tensor]:
    """The decoder layer's tensors, named as in the drafter."""
    weights = {f"layers.0.{name}": weight for name, weight in target.last_layer.items()}
    weights["layers.0.hidden_norm.weight"] = weights["layers.0.input_layernorm.weight"]
    weights["layers.0.input_layernorm.weight"] = torch.ones(config.hidden_size)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"layers.0.self_attn.{name}.weight"
        weights[key] = _beside_noise(weights[key], config.hidden_size, generator)
    return weights


def _beside_noise(weight: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """`weight` [rows, n] with `columns` of noise put before it."""
    noise = torch.randn(len(weight), columns, generator=generator) * _NOISE
    return torch.cat([noise.to(weight.device), weight], dim=1)


def ensure_drafter(store: DrafterStore, target_dir: Path, speculation: SpeculationConfig, seed: int) -> DrafterVersion:
    """The newest sound version in `store`; an empty one first gets the day-0 drafter or, if given, another's copy.

    Processes that start together may all call it: one of them fills the store. Raises DrafterRefused when what is there
    does not belong to the target, ValueError for a target without drafters.
    """
    return newest_or(
        store,
        lambda: _publish_first(store, target_dir, speculation, seed),
        belongs=lambda directory: check_directory(directory, target_dir),
        sound=lambda directory: check_tensors(directory, target_dir),
    )


def newest_or(
    store: DrafterStore,
    publish_first: Callable[[], DrafterVersion],
    *,
    belongs: Callable[[Path], object],
    sound: Callable[[Path], object],
) -> DrafterVersion:
    """The newest version that is undamaged and `sound`; one process calls `publish_first` when there is none.

    A version that is not is rejected: whoever starts after a fault comes back with the last good one. `belongs` may
    raise DrafterRefused for files that are the user's mistake; that is passed on.
    """
    with (store.root / ".first-version").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while (number := store.latest()) is not None:
            if _passes(store, number, partial(store.verify, number)):
                version = store.read(number)
                belongs(version.path)
                if _passes(store, number, partial(sound, version.path)):
                    return version
        return publish_first()


def _passes(store: DrafterStore, number: int, check: Callable[[], object]) -> bool:
    """Whether a version passes a check; one that does not is rejected."""
    try:
        check()
    except DrafterRefused as error:
        log.error("version %d is not used, but the one before it: %s", number, error)
        store.reject(number, str(error))
        return False
    return True


def _publish_first(store: DrafterStore, target_dir: Path, speculation: SpeculationConfig, seed: int) -> DrafterVersion:
    target = TargetWeights.load(target_dir)
    if speculation.drafter is not None:
        model, origin = load_drafter(speculation.drafter, target), f"copied from {speculation.drafter}"
    else:
        config = Eagle3Config.for_target(target.config, speculation.draft_vocab, target.name)
        model, origin = initialise(target, config, seed), "initialised from the target"
    metadata = {"parent": None, "origin": origin, "trainer_step": 0, "tokens_trained": 0}
    return store.publish(lambda directory: save_drafter(model, directory, speculation.k_max, target), metadata)
