"""What is drafted for whom: own text, the group's answers, nobody else's."""

import numpy as np

from drafters.ngram import NgramTable
from drafters.served_text import ServedText

_SLOTS = 256
_ROOMY = 1 << 30


def _served(text: ServedText, request: str, group: tuple[str, str], prompt: list[int], answer: list[int]) -> None:
    text.begin(request, group, prompt, len(answer))
    text.extend(request, answer)
    text.finish(request)


def _drafts(text: ServedText, group: tuple[str, str], prompt: list[int], k: int = 3) -> list[int]:
    text.begin("probe", group, prompt, 8)
    drafted = text.propose(["probe"], k).tokens[0]
    text.finish("probe")
    return drafted


def test_a_request_drafts_from_its_own_prompt_and_answer():
    text = ServedText(_ROOMY, _SLOTS)
    text.begin("a", ("", ""), [1, 2, 3, 4, 1, 2], 10)
    assert text.propose(["a"], 2).tokens[0] == [3, 4]
    text.extend("a", [9, 8])
    text.extend("a", [7, 9])
    assert text.propose(["a"], 2).tokens[0] == [8, 7]


def test_answers_are_shared_within_the_group_and_nowhere_else():
    text = ServedText(_ROOMY, _SLOTS)
    _served(text, "a", ("tenant", "sql"), [1, 2], [50, 51, 52])
    assert _drafts(text, ("tenant", "sql"), [2, 50]) == [51, 52]
    assert _drafts(text, ("other", "sql"), [2, 50]) == []
    assert _drafts(text, ("tenant", "code"), [2, 50]) == []


def test_prompts_are_not_shared():
    text = ServedText(_ROOMY, _SLOTS)
    _served(text, "a", ("", ""), [40, 41, 42, 43], [60])
    assert _drafts(text, ("", ""), [40, 41]) == []
    assert _drafts(text, ("", ""), [42, 43]) == [60]  # the answer's first token, after the prompt's last ones


def test_an_unfinished_request_is_not_shared():
    text = ServedText(_ROOMY, _SLOTS)
    text.begin("a", ("", ""), [1], 4)
    text.extend("a", [70, 71, 72])
    assert _drafts(text, ("", ""), [70]) == []


def test_the_group_used_longest_ago_is_forgotten_when_memory_is_full():
    one_table = NgramTable(_SLOTS).nbytes
    text = ServedText(2 * one_table, _SLOTS)
    for i, group in enumerate(("a", "b", "a", "c")):
        _served(text, f"r{i}", (group, ""), [1], [80, 81, 82])
    assert text.nbytes <= 2 * one_table
    assert _drafts(text, ("a", ""), [80]) == [81, 82]
    assert _drafts(text, ("b", ""), [80]) == []


def test_more_tokens_than_room_are_left_out():
    text = ServedText(_ROOMY, _SLOTS)
    text.begin("a", ("", ""), [1, 2], 2)
    text.extend("a", np.arange(10, 20).tolist())
    assert text.propose(["a"], 1).tokens[0] == []
    text.finish("a")
    assert "a" not in text


def test_room_for_a_long_answer_takes_no_memory_of_its_size():
    text = ServedText(_ROOMY, _SLOTS)
    text.begin("a", ("", ""), [1, 2, 3], 1_000_000)
    assert text._requests["a"].own.nbytes < 4 << 20
