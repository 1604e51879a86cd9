import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora.config import SpeculationConfig
from aurora.store import REJECTED, DrafterRefused, DrafterStore
from drafters import Eagle3, Eagle3Config, TargetWeights, ensure_drafter, initialise, load_drafter, save_drafter
from drafters.rotary import inverse_frequencies
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, write_target


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(target_dir: Path) -> TargetWeights:
    return TargetWeights.load(target_dir)


@pytest.fixture
def model(target: TargetWeights) -> Eagle3:
    return initialise(target, Eagle3Config.for_target(target.config, DRAFT_VOCAB, target.name), seed=0)


@pytest.fixture
def saved(model: Eagle3, target: TargetWeights, tmp_path: Path) -> Path:
    save_drafter(model, tmp_path, 3, target)
    return tmp_path


def test_a_saved_drafter_comes_back_bit_for_bit(model: Eagle3, saved: Path, target: TargetWeights) -> None:
    loaded = load_drafter(saved, target)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_files_shapes_are_the_configs(model: Eagle3, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == model.config.shapes()
    assert "embed_tokens.weight" not in tensors, "shared with the target, never stored"


def test_nothing_saved_or_trained_shares_memory_with_the_target(model: Eagle3, target: TargetWeights) -> None:
    frozen = {t.data_ptr() for t in (target.embed_tokens, target.lm_head, target.norm, *target.last_layer.values())}
    assert not frozen & {p.data_ptr() for p in model.parameters()}
    assert model.embed_tokens.data_ptr() == target.embed_tokens.data_ptr()
    assert not model.embed_tokens.requires_grad


def test_the_start_is_the_target_and_the_same_for_a_seed(model: Eagle3, target: TargetWeights) -> None:
    again = initialise(target, model.config, seed=0).state_dict()
    other = initialise(target, model.config, seed=1).state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())
    assert not torch.equal(other["fc.weight"], again["fc.weight"])
    assert torch.equal(model.lm_head.weight, target.lm_head[model.draft_ids])
    assert torch.equal(model.layer.mlp.up_proj.weight, target.last_layer["mlp.up_proj.weight"])
    assert set(target.special_ids) <= set(model.draft_ids.tolist())


def _set(key: str, value: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        branch = config["transformer_layer_config"] if key in config["transformer_layer_config"] else config
        branch[key] = value
        (directory / "config.json").write_text(json.dumps(config))

    return edit


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json.*not an EAGLE-3 drafter"),
    "flat config": (lambda d: (d / "config.json").write_text('{"hidden_size": 48}'), "draft_vocab_size"),
    "not json": (lambda d: (d / "config.json").write_text("{"), r"config\.json"),
    "other size": (_set("hidden_size", 64), "hidden_size is 64, the target needs 48"),
    "other layers": (_set("eagle_aux_hidden_state_layer_ids", [1, 2, 3]), "eagle_aux_hidden_state_layer_ids"),
    "other kind": (_set("norm_before_residual", True), "norm_before_residual"),
    "other vocabulary": (_set("vocab_size", 999), "vocab_size is 999"),
    "other target": (_set("aurora", {"target_fingerprint": "0" * 64}), "trained for another model"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors: not readable"),
    "cut short": (lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 40), "not readable"),
    "missing key": (_tensors(lambda t: t.pop("fc.weight")), "'fc.weight' is missing"),
    "unknown key": (_tensors(lambda t: t.update(extra=torch.zeros(1))), "'extra' is unknown"),
    "shape": (_tensors(lambda t: t.update({"fc.weight": torch.zeros(2, 2)})), r"fc\.weight has shape \(2, 2\)"),
    "type": (_tensors(lambda t: t.update(d2t=t["d2t"].float())), "d2t has type"),
    "not finite": (_tensors(lambda t: t["norm.weight"].fill_(float("nan"))), r"norm\.weight.*not finite"),
    "map": (_tensors(lambda t: t["t2d"].logical_not_()), "d2t and t2d"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_drafter_that_does_not_fit_is_refused(
    damage: Callable[[Path], None], message: str, saved: Path, target: TargetWeights
) -> None:
    damage(saved)
    with pytest.raises(DrafterRefused, match=message):
        load_drafter(saved, target)


def test_the_older_layer_name_is_understood(saved: Path, target: TargetWeights, model: Eagle3) -> None:
    tensors = load_file(saved / "model.safetensors")
    save_file({k.replace("layers.0.", "midlayer."): v for k, v in tensors.items()}, saved / "model.safetensors")
    assert torch.equal(load_drafter(saved, target).fc.weight, model.fc.weight)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma2"),
        ("hidden_act", "gelu"),
        ("final_logit_softcapping", 30.0),
        ("logits_scaling", 8.0),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("num_hidden_layers", 3),
    ],
)
def test_a_target_that_cannot_be_followed_is_refused(target: TargetWeights, field: str, value: object) -> None:
    with pytest.raises(ValueError, match="no EAGLE-3 drafter for a target with"):
        Eagle3Config.for_target({**target.config, field: value}, 256)


def test_a_draft_vocabulary_as_large_as_the_targets_is_refused(target: TargetWeights) -> None:
    with pytest.raises(ValueError, match=r"lower speculation\.draft_vocab"):
        Eagle3Config.for_target(target.config, VOCAB)


def test_a_sharded_tied_target_loads(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    whole = write_target(tmp_path / "whole", tie_word_embeddings=True)
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    one, many = TargetWeights.load(whole), TargetWeights.load(tmp_path / "parts")
    assert one.fingerprint == many.fingerprint
    assert one.lm_head.data_ptr() == one.embed_tokens.data_ptr()
    assert all(torch.equal(one.last_layer[name], many.last_layer[name]) for name in one.last_layer)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        TargetWeights.load(tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_frequencies_are_the_targets(rope: dict, target: TargetWeights) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = Eagle3Config.for_target({**target.config, "rope_parameters": rope}, 256)
    fields = {k: v for k, v in target.config.items() if k not in ("rope_parameters", "model_type")}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**fields, rope_parameters=dict(rope))).inv_freq
    torch.testing.assert_close(inverse_frequencies(config), theirs)


def test_the_first_drafter_is_published_once(target_dir: Path, tmp_path: Path) -> None:
    store, speculation = DrafterStore(tmp_path), SpeculationConfig(draft_vocab=DRAFT_VOCAB)
    first = ensure_drafter(store, target_dir, speculation, 0)
    again = ensure_drafter(store, target_dir, speculation, 0)
    assert (first.number, again.number) == (1, 1)
    assert first.metadata["origin"] == "initialised from the target"
    assert load_drafter(first.path, TargetWeights.load(target_dir)).config.hidden_size == HIDDEN


def test_a_given_drafter_is_copied_and_a_strangers_refused(
    target_dir: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    speculation = SpeculationConfig(draft_vocab=DRAFT_VOCAB, drafter=saved)
    store = DrafterStore(tmp_path_factory.mktemp("store"))
    assert str(saved) in ensure_drafter(store, target_dir, speculation, 0).metadata["origin"]
    stranger = write_target(tmp_path_factory.mktemp("other"), seed=1, hidden_size=64, head_dim=16)
    with pytest.raises(DrafterRefused, match="hidden_size"):
        ensure_drafter(store, stranger, speculation, 0)


def spoil(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_whoever_starts_after_a_fault_comes_back_with_the_last_good_drafter(target_dir: Path, tmp_path: Path) -> None:
    store, speculation = DrafterStore(tmp_path), SpeculationConfig(draft_vocab=DRAFT_VOCAB)
    target = TargetWeights.load(target_dir)
    good = load_drafter(ensure_drafter(store, target_dir, speculation, 0).path, target)
    for _ in range(2):
        store.publish(lambda directory: save_drafter(good, directory, 3, target), {})
    with torch.no_grad():
        good.lm_head.weight[0, 0] = float("nan")
    store.publish(lambda directory: save_drafter(good, directory, 3, target), {})
    spoil(tmp_path / "v000003" / "model.safetensors")
    assert ensure_drafter(DrafterStore(tmp_path), target_dir, speculation, 0).number == 2
    assert "not finite" in (tmp_path / "v000004" / REJECTED).read_text()
    assert "SHA-256 differs" in (tmp_path / "v000003" / REJECTED).read_text()
    for number in (1, 2):
        spoil(tmp_path / f"v{number:06d}" / "config.json")
    assert ensure_drafter(DrafterStore(tmp_path), target_dir, speculation, 0).number == 5, "day 0 again"
