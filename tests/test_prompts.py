import json

import pytest

from aurora.config import UserError
from aurora.prompts import Conversation, read_prompts


def write(tmp_path, *lines):
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(file)


ROWS = (
    {"prompt": "a", "domain": "sql", "variant": "sudden"},
    {"prompt": "b", "domain": "code", "variant": "sudden"},
    {"prompt": "c", "domain": "sql", "variant": "mixed"},
)


def test_reads_prompts_and_turns_in_order_and_skips_blank_lines(tmp_path):
    file = write(tmp_path, {"prompt": "a", "domain": "sql"}, "", {"prompt": "b", "turns": ["b", "c"]}, "")
    assert read_prompts(file) == [Conversation(("a",), "sql"), Conversation(("b", "c"))]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"variant": "sudden"}, ["a", "b"]),
        ({"domain": "sql"}, ["a", "c"]),
        ({"variant": "sudden", "domain": "sql"}, ["a"]),
        ({"variant": "sudden", "limit": 1}, ["a"]),
        ({"limit": 99}, ["a", "b", "c"]),
    ],
)
def test_filters_then_limits(tmp_path, filters, expected):
    assert [c.turns[0] for c in read_prompts(write(tmp_path, *ROWS), **filters)] == expected


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False), encoding="utf-8")
    assert read_prompts(str(file))[0].turns == ("a\u2028b\u0085c",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": ', "not JSON: Expecting value at column 12"),
        ('{"prompt": "', "not JSON: Unterminated string starting at column 12"),
        ('["prompt"]', "a JSON list, not an object"),
        ('{"question": "a"}', "neither `prompt` nor `turns`"),
        ('{"prompt": 3}', "`prompt` must be a non-empty string, got '3'"),
        ('{"prompt": ""}', "`prompt` must be a non-empty string"),
        ('{"turns": []}', "`turns` must be a list of non-empty strings"),
        ('{"turns": ["a", null]}', "`turns` must be a list of non-empty strings"),
        ("[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_a_bad_row_is_named_by_line_even_beyond_the_limit(tmp_path, line, reason):
    file = write(tmp_path, {"prompt": "a"}, {"prompt": "b"}, line)
    with pytest.raises(UserError) as caught:
        read_prompts(file, limit=1)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"set\.jsonl:2: not UTF-8"):
        read_prompts(str(file))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/set", "~/nowhere/set"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(name)


def test_an_empty_file_and_a_filter_without_rows(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        read_prompts(write(tmp_path, "", ""))
    with pytest.raises(UserError, match=r"--variant steep: no row of .* has it; choose one of mixed, sudden"):
        read_prompts(write(tmp_path, *ROWS), variant="steep")
    with pytest.raises(UserError, match=r"--variant sudden: .* choose one of none"):
        read_prompts(write(tmp_path, {"prompt": "a"}), variant="sudden")


@pytest.fixture
def hub_offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_a_directory_goes_through_the_datasets_library(tmp_path, hub_offline):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "set" / "test.jsonl").write_text('{"prompt": "t", "domain": null}\n')
    assert [c.turns[0] for c in read_prompts(str(tmp_path / "set"), domain="sql")] == ["a", "c"]
    assert read_prompts(str(tmp_path / "set"), split="test") == [Conversation(("t",))]
    with pytest.raises(UserError, match=r"split nope: Unknown split .* check the name and --split"):
        read_prompts(str(tmp_path / "set"), split="nope")


def test_a_hub_name_without_the_hub(hub_offline):
    with pytest.raises(UserError, match="data set someone/some-set: neither a file here nor in the local cache"):
        read_prompts("someone/some-set")
