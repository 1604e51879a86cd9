"""Names of domains: labels, clusters, neither; bounded, and never mistaken for one another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domains import MAX_LABEL, Domains

PROMPT = np.arange(1000, 1040, dtype=np.int32)


def _alike(count: int) -> list[np.ndarray]:
    """Prompts of one kind."""
    rng = np.random.default_rng(0)
    return [np.concatenate([[i], rng.permutation(PROMPT), [i]]).astype(np.int32) for i in range(count)]


def test_a_label_is_the_domain_and_teaches_the_clusters_nothing():
    domains = Domains(cluster=True)
    assert {domains.of("sql", prompt) for prompt in _alike(30)} == {"sql"}
    assert domains.of("", PROMPT) == ""


def test_prompts_without_a_label_get_a_cluster_where_that_is_asked_for():
    domains, neither = Domains(cluster=True), Domains(cluster=False)
    named = [domains.of("", prompt) for prompt in _alike(30)]
    assert named[0] == ""
    assert named[-1].startswith("cluster-")
    assert {neither.of("", prompt) for prompt in _alike(30)} == {""}


def test_labels_without_end_do_not_take_memory_without_end():
    domains = Domains(cluster=False)
    assert domains.of("sql", PROMPT) == "sql"
    assert len({domains.of(f"label {i}", PROMPT) for i in range(1000)}) < 100
    assert domains.of("label 999", PROMPT) == ""
    assert domains.of("sql", PROMPT) == "sql"
    assert Domains(cluster=False).of("x" * (MAX_LABEL + 1), PROMPT) == ""


@pytest.mark.parametrize("label", ["cluster-0", "cluster-3", "cluster-", "label:cluster-0"])
def test_no_label_names_a_cluster(label: str):
    assert not Domains(cluster=True).of(label, PROMPT).startswith("cluster-")


@given(st.sets(st.sampled_from(["a", "cluster-0", "label:a", "label:cluster-0", "label:label:cluster-0", "cluster-1"])))
def test_different_labels_are_different_domains(labels: set[str]):
    domains = Domains(cluster=True)
    assert len({domains.of(label, PROMPT) for label in labels}) == len(labels)
