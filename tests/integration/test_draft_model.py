"""Three drafters in one engine: what a user reads is the target's, whoever drafts and whichever version is live."""

import re

import pytest

from aurora.store import DrafterStore
from tests.integration.process import ServedModel, random_prompts

pytestmark = pytest.mark.engine


def _accepted(server: ServedModel) -> dict[str, float]:
    """Accepted drafts by drafter."""
    found = re.findall(r'^aurora_accepted_tokens_total\{version="(-?\d+)"\} (\S+)$', server.get("/metrics"), re.M)
    totals = {"eagle3": 0.0, "ngram": 0.0, "model": 0.0}
    for version, value in found:
        totals["eagle3" if int(version) > 0 else "model" if int(version) < 0 else "ngram"] += float(value)
    return totals


def test_greedy_text_is_the_targets_with_three_drafters(learning: ServedModel, plain: ServedModel) -> None:
    """Again and again until the draft model was exchanged and everybody's drafts were accepted.

    Each time as another tenant: the table must not know the answers by heart, or it would draft alone.
    """
    prompts = random_prompts(40)
    expected = plain.answers(prompts)
    assert len({tuple(e) for e in expected}) > 30
    for tenant in range(40):
        assert learning.answers(prompts, cache_salt=f"tenant {tenant}") == expected
        if learning.metric("aurora_draft_model_version") >= 2 and all(_accepted(learning).values()):
            break
    assert all(_accepted(learning).values()), _accepted(learning)
    assert learning.metric("aurora_draft_model_version") >= 2
    assert learning.metric("aurora_swap_failures_total") == 0
    store = DrafterStore(learning.run_dir / "draft_models")
    newest = store.latest()
    assert newest is not None
    assert store.verify(newest).metadata["acceptance_length"] > 1
