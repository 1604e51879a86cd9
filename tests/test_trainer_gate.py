from pathlib import Path

import pytest
import torch

from drafters import Eagle3, Eagle3Config, TargetWeights, initialise
from tests.tiny import DRAFT_VOCAB, TinyServer, half_right, prompts
from trainer.gate import _batches, judge, measure
from trainer.sequence import OpenSequence, Sequence


@pytest.fixture(scope="module")
def sequences(directory: Path) -> list[Sequence]:
    server, found = TinyServer(directory), []
    for i, prompt in enumerate(prompts(3)):
        traces = server.traces(f"r{i}", prompt, 12, half_right)
        sequence = OpenSequence.begin(traces[0])
        for trace in traces:
            sequence.append(trace)
        found.append(sequence.snapshot())
    return found


def drafter(directory: Path, seed: int) -> Eagle3:
    target = TargetWeights.load(directory)
    return initialise(target, Eagle3Config.for_target(target.config, DRAFT_VOCAB), seed)


class Oracle(Eagle3):
    """Drafts token `answer` whatever it reads."""

    answer = 0

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(state), len(self.d2t))
        out[:, self.answer] = 1.0
        return out


def test_acceptance_is_the_matching_prefix_of_greedy_drafts(directory: Path, sequences: list[Sequence]) -> None:
    plain = drafter(directory, 0)
    oracle = Oracle(plain.config, plain.embed_tokens)
    oracle.load_state_dict(plain.state_dict())
    sequence = sequences[0]
    oracle.answer = int((plain.draft_ids == sequence.ids[sequence.first_start + 3]).nonzero()[0])
    token = int(plain.draft_ids[oracle.answer])
    starts = range(sequence.first_start, sequence.end_start)
    runs = [[int(t) == token for t in sequence.ids[s + 2 : s + 5]] for s in starts]
    expected = []
    for depth in range(3):
        known = [run for s, run in zip(starts, runs, strict=True) if s + 2 + depth < len(sequence.ids)]
        expected.append(sum(all(run[: depth + 1]) for run in known) / len(known))
    found = measure(oracle, _batches([sequence], 3, "cpu"))
    assert list(found.per_position) == pytest.approx(expected)
    assert found.length == pytest.approx(1 + sum(expected))
    assert found.rows == len(starts)


def test_a_drafter_is_no_better_than_itself_whatever_the_margin(directory: Path, sequences: list[Sequence]) -> None:
    live = drafter(directory, 0)
    for margin in (0.0, 0.01, -5.0):
        verdict = judge(live, live, sequences, 3, margin)
        assert not verdict.passed
        assert verdict.candidate == verdict.live


def test_a_broken_candidate_fails(directory: Path, sequences: list[Sequence]) -> None:
    live, candidate = drafter(directory, 0), drafter(directory, 0)
    answer = int((live.draft_ids == sequences[0].ids[-2]).nonzero()[0])
    oracle = Oracle(live.config, live.embed_tokens)
    oracle.load_state_dict(live.state_dict())
    oracle.answer = answer
    with torch.no_grad():
        candidate.lm_head.weight.zero_()
    assert not judge(candidate, oracle, sequences, 3, margin=0.0).passed
    assert judge(oracle, candidate, sequences, 3, margin=0.01).passed


def test_nothing_to_judge_on_does_not_pass(directory: Path) -> None:
    live = drafter(directory, 0)
    assert not judge(live, live, [], 3, margin=0.0).passed
