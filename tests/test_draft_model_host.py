"""The draft model beside an engine: it drafts after what the runner's requests have said, and is exchanged whole."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora.config import SpeculationConfig
from aurora.store import DrafterRefused, DrafterStore
from drafters import IncrementalDrafter, TargetWeights, ensure_draft_model, load_draft_model, save_draft_model
from drafters.draft_files import FROZEN, TRAINED
from serve.draft_model import DraftModelHost
from tests.tiny import DRAFT_VOCAB, prompts


@pytest.fixture
def store(target: TargetWeights, tmp_path: Path) -> DrafterStore:
    """With version 1 from the target's layers and a version 2 of other weights."""
    store = DrafterStore(tmp_path)
    first = ensure_draft_model(store, target, SpeculationConfig(draft_vocab=DRAFT_VOCAB))
    model = load_draft_model(first.path, target)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    store.publish(lambda at: save_draft_model(model, at, target, first.path / FROZEN), {"gated_rates": [0.5]})
    return store


def _runner(directory: Path, texts: dict[str, list[int]]) -> SimpleNamespace:
    """What the host sees of a model runner: rows of token ids, with room for drafts behind them."""
    ids = np.full((len(texts), 64), 7, np.int32)
    for row, text in zip(ids, texts.values(), strict=True):
        row[: len(text)] = text
    batch = SimpleNamespace(
        req_id_to_index={r: i for i, r in enumerate(texts)},
        token_ids_cpu=ids,
        num_tokens_no_spec=np.array([len(text) for text in texts.values()]),
    )
    model_config = SimpleNamespace(model=str(directory))
    return SimpleNamespace(
        device=torch.device("cpu"),
        input_batch=batch,
        requests=texts,
        vllm_config=SimpleNamespace(model_config=model_config),
    )


def _expected(store: DrafterStore, version: int, target: TargetWeights, text: list[int]) -> list[int]:
    drafter = IncrementalDrafter(load_draft_model(store.read(version).path, target))
    return drafter.draft({"a": np.array(text)}, 3).tokens["a"]


def test_it_drafts_after_what_each_request_said(directory: Path, store: DrafterStore, target: TargetWeights) -> None:
    texts = dict(zip("abc", prompts(3, 9), strict=True))
    host = DraftModelHost(_runner(directory, texts), store.root, 1)
    drafts = host.draft(["a", "c", "gone"], 3)
    assert drafts == {r: _expected(store, 1, target, texts[r]) for r in ("a", "c")}


def test_a_version_is_exchanged_whole_and_the_target_stays(
    directory: Path, store: DrafterStore, target: TargetWeights
) -> None:
    texts = {"a": prompts(1, 9)[0]}
    host = DraftModelHost(_runner(directory, texts), store.root, 1)
    before = [t.clone() for t in (host._target.embed_tokens, host._target.lm_head)]
    staged = host.stage(2)
    assert host.draft(["a"], 3) == {"a": _expected(store, 1, target, texts["a"])}, "staged is not live"
    host.commit(staged)
    host._drafter.retain({})
    assert (host.version, host.gated_rates) == (2, [0.5])
    assert host.draft(["a"], 3) == {"a": _expected(store, 2, target, texts["a"])}
    assert _expected(store, 1, target, texts["a"]) != _expected(store, 2, target, texts["a"])
    own = {p.untyped_storage().data_ptr() for p in staged.model.parameters()}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in (host._target.embed_tokens, host._target.lm_head))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (host._target.embed_tokens, host._target.lm_head), strict=True)
    )


def test_a_version_that_is_refused_leaves_the_live_one(
    directory: Path, store: DrafterStore, target: TargetWeights
) -> None:
    texts = {"a": prompts(1, 9)[0]}
    host = DraftModelHost(_runner(directory, texts), store.root, 1)
    path = store.read(2).path / TRAINED
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, path)
    with pytest.raises(DrafterRefused, match="SHA-256 differs"):
        host.stage(2)
    assert host.version == 1
    assert host.draft(["a"], 3) == {"a": _expected(store, 1, target, texts["a"])}
