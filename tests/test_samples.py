import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from aurora.rows import DRAFT_COLUMNS
from trainer.samples import DraftSamples, text_decoder


def ids(tokens):
    return " ".join(map(str, tokens))


def draft(make_trace, number, accepted=1):
    """Drafts `number`, 8, 9 after token 5, of which the first `accepted` were right, then 7."""
    drafts = [number, 8, 9]
    return make_trace(
        input_ids=np.array([5, *drafts]),
        k=3,
        accepted=accepted,
        emitted_ids=np.array([*drafts[:accepted], 7]),
        drafter_version=2,
    )


def test_a_row_shows_what_was_accepted_rejected_and_said_instead(make_trace):
    samples = DraftSamples(ids, seed=0)
    samples.add([draft(make_trace, 6), draft(make_trace, 6, accepted=3), draft(make_trace, 6, accepted=0)])
    rows = samples.take()
    assert [dict(zip(DRAFT_COLUMNS, row, strict=True)) for row in rows[:2]] == [
        {"version": 2, "domain": "", "k": 3, "accepted": "6", "rejected": "8 9", "instead": "7"},
        {"version": 2, "domain": "", "k": 3, "accepted": "6 8 9", "rejected": "", "instead": "7"},
    ]
    assert rows[2][3:] == ["", "6 8 9", "7"]
    assert samples.take() == []


def test_steps_without_drafts_are_no_rows(make_trace):
    samples = DraftSamples(ids, seed=0)
    samples.add([make_trace(input_ids=np.array([5]), k=0, accepted=0, emitted_ids=np.array([7]))])
    assert samples.take() == []


def test_a_bounded_number_is_kept_early_and_late_ones_alike(make_trace):
    samples = DraftSamples(ids, seed=0)
    samples.add(draft(make_trace, number) for number in range(1000))
    numbers = [int(row[3]) for row in samples.take()]
    assert len(numbers) == 64 == len(set(numbers))
    assert 300 < sum(numbers) / 64 < 700


@pytest.mark.parametrize("tokenizer", [True, False])
def test_text_comes_from_the_tokenizer_and_ids_without_one(tmp_path, tokenizer):
    if tokenizer:
        model = Tokenizer(WordLevel({"a": 0, "plan": 1, "[UNK]": 2}, unk_token="[UNK]"))
        model.pre_tokenizer = Whitespace()
        model.save(str(tmp_path / "tokenizer.json"))
    assert text_decoder(tmp_path)([0, 1]) == ("a plan" if tokenizer else "0 1")
