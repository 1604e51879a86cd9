"""Clusters of prompts: kinds are found in any order of arrival, the chat template does not count, memory is bounded."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.clusters import MAX_CLUSTERS, PromptClusters, _Frame

KINDS = 4
TEMPLATE, END = list(range(5000, 5030)), [5100, 5101]


def _prompt(kind: int, rng: random.Random) -> np.ndarray:
    """Words of everyday use, words of the kind, words of its own, in a chat template."""
    everyday = [rng.randrange(100) for _ in range(8)]
    of_kind = [10_000 + 1000 * kind + rng.randrange(40) for _ in range(25)]
    own = [rng.randrange(20_000, 49_000) for _ in range(10)]
    body = everyday + of_kind + own
    rng.shuffle(body)
    return np.array(TEMPLATE + body + END, np.int32)


def _orders() -> dict[str, list[int]]:
    sudden = [kind for kind in range(KINDS) for _ in range(60)]
    return {"sudden": sudden, "mixed": random.Random(1).sample(sudden, len(sudden)), "recurring": sudden[::3] * 3}


@pytest.mark.parametrize("order", ["sudden", "mixed", "recurring"])
def test_kinds_are_told_apart_in_any_order_of_arrival(order: str):
    rng, clusters = random.Random(0), PromptClusters()
    kinds = _orders()[order]
    pairs = Counter((clusters.assign(_prompt(kind, rng)), kind) for kind in kinds)
    named = Counter({pair: n for pair, n in pairs.items() if pair[0] is not None})
    assert named.total() > 0.7 * len(kinds)
    assert {kind for _, kind in named} == set(range(KINDS))
    biggest = Counter[int]()
    for (cluster, _), n in named.items():
        biggest[cluster] = max(biggest[cluster], n)
    assert biggest.total() > 0.95 * named.total()
    assert len(biggest) <= 2 * KINDS


def test_one_kind_is_one_cluster():
    rng, clusters = random.Random(0), PromptClusters()
    found = Counter(clusters.assign(_prompt(0, rng)) for _ in range(100))
    assert len(found) == 2
    assert found[None] < 20


def test_few_prompts_of_a_kind_have_no_cluster():
    rng, clusters = random.Random(0), PromptClusters()
    assert [clusters.assign(_prompt(0, rng)) for _ in range(6)] == [None] * 6


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 200_000), max_size=30), max_size=60))
def test_any_prompts_in_the_same_order_give_the_same_clusters_within_the_bound(texts):
    prompts = [np.array(text, np.int32) for text in texts]
    first, second = PromptClusters(), PromptClusters()
    found = [first.assign(prompt) for prompt in prompts]
    assert found == [second.assign(prompt) for prompt in prompts]
    assert all(cluster is None or 0 <= cluster < MAX_CLUSTERS for cluster in found)


def test_more_kinds_than_there_is_room_for_leave_the_newest_with_a_cluster():
    rng, clusters = random.Random(0), PromptClusters()
    for kind in range(3 * MAX_CLUSTERS):
        found = [clusters.assign(_prompt(kind, rng)) for _ in range(30)]
        assert len(set(found[-15:])) == 1
        assert found[-1] is not None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=20), min_size=30, max_size=60))
def test_the_frame_is_what_prompts_share_and_no_more(bodies):
    frame = _Frame()
    for i, body in enumerate(bodies):
        bracketed = [60 + i, *body, 200 + i]
        found = frame.strip(np.array(TEMPLATE + bracketed + END, np.int32))
    assert found.tolist() == bracketed


def test_a_prompt_without_the_frame_is_left_whole_and_changes_nothing():
    rng, frame = random.Random(0), _Frame()
    for _ in range(100):
        frame.strip(_prompt(0, rng))
    bare = np.arange(300, 340, dtype=np.int32)
    assert frame.strip(bare).tolist() == bare.tolist()
    prompt = _prompt(1, rng)
    assert len(frame.strip(prompt)) <= len(prompt) - len(TEMPLATE) - len(END)
    assert len(frame.strip(np.zeros(0, np.int32))) == 0
