"""The draft model: its directory is an ordinary Llama, and what it drafts depends on the text alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from aurora.config import SpeculationConfig
from aurora.store import DrafterRefused, DrafterStore
from drafters import (
    DraftModel,
    IncrementalDrafter,
    TargetWeights,
    ensure_draft_model,
    initialise_draft_model,
    load_draft_model,
    save_draft_model,
)
from drafters.draft_files import FROZEN, TRAINED
from drafters.draft_model import attend_packed
from tests.tiny import DRAFT_VOCAB, VOCAB, prompts, write_target


@pytest.fixture(scope="module")
def model(target: TargetWeights) -> DraftModel:
    return initialise_draft_model(target, 2, DRAFT_VOCAB)


@torch.no_grad()
def _recomputed(model: DraftModel, text: list[int], k: int) -> list[int]:
    """Greedy drafts, the whole text read anew for each."""
    ids = list(text)
    for _ in range(k):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), attend_packed((0, len(ids))))
        ids.append(int(model.draft_ids[model.logits(hidden[-1:]).argmax()]))
    return ids[len(text) :]


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"rope_theta": 5e5, "num_key_value_heads": 4}])
def test_the_directory_is_a_llama_with_the_same_logits(tmp_path: Path, fields: dict) -> None:
    target = TargetWeights.load(write_target(tmp_path / "target", **fields))
    model = initialise_draft_model(target, 3, DRAFT_VOCAB)
    torch.nn.init.normal_(model.norm.weight)
    (tmp_path / "model").mkdir()
    save_draft_model(model, tmp_path / "model", target)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    packed, bounds = prompts(3, 11), (0, 11, 22, 33)
    with torch.no_grad():
        hidden = model(torch.tensor(packed).flatten(), torch.arange(11).repeat(3), attend_packed(bounds))
        expected = theirs(torch.tensor(packed)).logits.flatten(0, 1)
    assert torch.allclose(model.logits(hidden), expected[:, model.draft_ids], atol=1e-4)
    loaded = load_draft_model(tmp_path / "model", target)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded.head, model.head)


def test_day_0_is_made_of_the_targets_layers(model: DraftModel, directory: Path, target: TargetWeights) -> None:
    theirs = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    for mine, layer in ((0, 0), (1, 6)):
        name = "mlp.down_proj.weight"
        assert torch.equal(model.state_dict()[f"layers.{mine}.{name}"], theirs[f"model.layers.{layer}.{name}"])
    assert model.embed_tokens.data_ptr() == target.embed_tokens.data_ptr(), "shared, not copied"
    assert {name for name, _ in model.named_parameters()}.isdisjoint({"embed_tokens", "lm_head", "head"})


_texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)
# what becomes of a request's text in a step: how much of it is taken back, and what is said then
_turns = st.lists(st.tuples(st.integers(0, 6), _texts), min_size=1, max_size=4)


@settings(max_examples=40)
@given(first=_texts, turns=_turns, neighbour=_texts, k=st.integers(1, 4))
def test_drafts_are_those_of_reading_everything_anew(model, first, turns, neighbour, k) -> None:
    """Whatever was read or drafted before and then taken back, and whoever drafts beside it."""
    drafter, text = IncrementalDrafter(model), list(first)
    for step, (back, said) in enumerate(turns):
        texts = {"a": np.array(text)} | ({"b": np.array(neighbour)} if step % 2 else {})
        assert drafter.draft(texts, k).tokens == {r: _recomputed(model, list(t), k) for r, t in texts.items()}
        text = text[: max(len(text) - back, 0)] + said


def test_accepted_drafts_are_not_read_again(model: DraftModel) -> None:
    drafter, text = IncrementalDrafter(model), prompts(1, 300)[0]
    drafts = drafter.draft({"a": np.array(text)}, 4)
    assert drafts.read == 300
    accepted, correction = drafts.tokens["a"][:2], (drafts.tokens["a"][2] + 1) % VOCAB
    assert drafter.draft({"a": np.array([*text, *accepted, correction])}, 4).read == 1
    unchanged = drafter.draft({"a": np.array([*text, *accepted, correction])}, 1)
    assert unchanged.read == 1, "the newest token is always read: it gives the first draft"
    drafter.retain({"a": "still live"})
    assert drafter._caches.keys() == {"a"}
    drafter.retain({})
    assert drafter._caches == {}
    assert drafter.draft({}, 2).tokens == {}


def test_another_vocabulary_drafts_other_tokens(target: TargetWeights) -> None:
    model = initialise_draft_model(target, 2, DRAFT_VOCAB)
    drafter = IncrementalDrafter(model)
    for first in (0, VOCAB - DRAFT_VOCAB):
        model.use_vocabulary(torch.arange(first, first + DRAFT_VOCAB))
        text = prompts(1)[0]
        drafts = drafter.draft({"a": np.array(text)}, 3).tokens["a"]
        assert drafts == _recomputed(model, text, 3)
        assert all(first <= token < first + DRAFT_VOCAB for token in drafts)


def test_versions_of_a_store_share_the_frozen_shard(model: DraftModel, target: TargetWeights, tmp_path: Path) -> None:
    store = DrafterStore(tmp_path)
    first = ensure_draft_model(store, target, SpeculationConfig(draft_vocab=DRAFT_VOCAB))
    assert ensure_draft_model(store, target, SpeculationConfig(draft_vocab=DRAFT_VOCAB)).number == first.number == 1
    frozen = first.path / FROZEN
    second = store.publish(lambda at: save_draft_model(model, at, target, frozen), {})
    assert (second.path / FROZEN).samefile(frozen)
    store.reject(1, "for this test")
    store.prune(1)
    assert not first.path.exists()
    assert store.verify(2).digests[FROZEN] == first.digests[FROZEN]
    LlamaForCausalLM.from_pretrained(second.path)


@pytest.mark.parametrize("wrong", ["key", "shape", "nan", "vocabulary", "target", "layers"])
def test_a_directory_that_does_not_fit_is_refused(
    model: DraftModel, target: TargetWeights, tmp_path: Path, wrong: str
) -> None:
    (tmp_path / "model").mkdir()
    save_draft_model(model, tmp_path / "model", target)
    path = tmp_path / "model" / TRAINED
    tensors = load_file(path)
    if wrong == "key":
        tensors["model.extra"] = torch.zeros(1)
    elif wrong == "shape":
        tensors["model.norm.weight"] = torch.zeros(3)
    elif wrong == "nan":
        tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path)
    if wrong == "vocabulary":
        (tmp_path / "model" / "draft_vocab.json").write_text(json.dumps([5, 4]))
    if wrong == "layers":
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    if wrong == "target":
        target = TargetWeights.load(write_target(tmp_path / "other", seed=4))
    with pytest.raises(DrafterRefused):
        load_draft_model(tmp_path / "model", target)


def test_more_layers_than_the_target_has_are_refused(target: TargetWeights) -> None:
    with pytest.raises(ValueError, match=r"draft_layers 7 must be below the target's 7 layers"):
        initialise_draft_model(target, 7, DRAFT_VOCAB)
