"""The file of results."""

import json
from pathlib import Path

import pytest

from aurora.config import UserError
from aurora.results import Row, read_rows, write_rows


def _row(policy: str, value: float, metric: str = "acceptance_length") -> Row:
    return Row("sudden", "sql", policy, metric, value, 1.0, "aurora replay")


def test_rows_of_the_same_place_are_replaced_and_others_kept(tmp_path: Path):
    file = tmp_path / "results.json"
    write_rows(file, [_row("a", 1.0), _row("b", 2.0)])
    write_rows(file, [_row("a", 3.0), _row("a", 4.0, "acceptance_rate")])
    assert {row.place[2:]: row.value for row in read_rows(file)} == {
        ("a", "acceptance_length"): 3.0,
        ("a", "acceptance_rate"): 4.0,
        ("b", "acceptance_length"): 2.0,
    }
    keys = {"experiment", "cell", "policy", "metric", "value", "baseline", "command"}
    assert all(set(row) == keys for row in json.loads(file.read_text()))
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="not a file of results"):
        write_rows(file, [_row("a", 1.0)])
    assert file.read_text() == '{"mine": 1}'
