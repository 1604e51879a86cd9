"""Three drafters in one engine: what a user reads is the target's, whoever drafts and whichever version is live."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from aurora.store import DrafterStore
from tests.integration.conftest import LEARNING
from tests.integration.process import START_LIMIT_S, ServedModel, random_prompts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def all_three(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The tiny model with all drafters and learning."""
    flags = (*LEARNING, "--drafters=eagle3,ngram,model", "--set=speculation.draft_layers=3")
    server = ServedModel(tiny_model, tmp_path_factory.mktemp("all_three"), *flags)
    server.wait_ready(START_LIMIT_S)
    yield server
    assert server.stop() == 0


def _accepted(server: ServedModel) -> dict[str, float]:
    """Accepted drafts by drafter."""
    found = re.findall(r'^aurora_accepted_tokens_total\{version="(-?\d+)"\} (\S+)$', server.get("/metrics"), re.M)
    totals = {"eagle3": 0.0, "ngram": 0.0, "model": 0.0}
    for version, value in found:
        totals["eagle3" if int(version) > 0 else "model" if int(version) < 0 else "ngram"] += float(value)
    return totals


def test_greedy_text_is_the_targets_with_three_drafters(all_three: ServedModel, plain: ServedModel) -> None:
    """Again and again until the draft model was exchanged and everybody's drafts were accepted."""
    prompts = random_prompts(40)
    expected = plain.answers(prompts)
    assert len({tuple(e) for e in expected}) > 30
    for _ in range(40):
        assert all_three.answers(prompts) == expected
        if all_three.metric("aurora_draft_model_version") >= 2 and all(_accepted(all_three).values()):
            break
    assert all(_accepted(all_three).values()), _accepted(all_three)
    assert all_three.metric("aurora_draft_model_version") >= 2
    assert all_three.metric("aurora_swap_failures_total") == 0
    store = DrafterStore(all_three.run_dir / "draft_models")
    newest = store.latest()
    assert newest is not None
    assert store.verify(newest).metadata["acceptance_length"] > 1
