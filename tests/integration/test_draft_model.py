"""Three drafters in one engine: what a user reads is the target's, whoever drafts and whichever version is live."""

import re

import pytest

from aurora.store import DrafterStore
from tests.integration.process import ServedModel, random_prompts

pytestmark = pytest.mark.engine


def _accepted_of_model(server: ServedModel) -> float:
    """Accepted drafts of the draft model: its versions count downwards from -1."""
    found = re.findall(r'^aurora_accepted_tokens_total\{version="-\d+"\} (\S+)$', server.get("/metrics"), re.M)
    return sum(map(float, found))


def test_greedy_text_is_the_targets_with_three_drafters(learning: ServedModel, plain: ServedModel) -> None:
    """Again and again until the draft model was exchanged and drafts of it were accepted.

    Each time as another tenant: the table must not know the answers by heart, or it would draft alone.
    """
    prompts = random_prompts(40)
    expected = plain.answers(prompts)
    assert len({tuple(e) for e in expected}) > 30
    for tenant in range(40):
        assert learning.answers(prompts, cache_salt=f"tenant {tenant}") == expected
        if learning.metric("aurora_draft_model_version") >= 2 and _accepted_of_model(learning) > 0:
            break
    assert learning.metric("aurora_draft_model_version") >= 2
    assert _accepted_of_model(learning) > 0
    assert learning.metric("aurora_swap_failures_total") == 0
    store = DrafterStore(learning.run_dir / "draft_models")
    newest = store.latest()
    assert newest is not None
    assert store.verify(newest).metadata["acceptance_length"] > 1
