"""Arrival traces: the public formats are read as they are, what cannot be used is named."""

from pathlib import Path

import numpy as np
import pytest

from aurora.arrivals import ArrivalTrace, read_arrivals, write_arrivals
from aurora.config import UserError

FORMATS = {
    "own.jsonl": '{"t_s": 5.0, "model": null, "request_tokens": 3, "response_tokens": 7}\n'
    '{"t_s": 6.5, "model": "m", "request_tokens": 4, "response_tokens": 8}\n',
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.5000000,3,7\n2023-11-16 18:15:48.0000000,4,8\n",
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,3,7,10,Conversation log\n6.5,GPT-4,4,8,12,API log\n",
    "mooncake.jsonl": '{"timestamp": 5000, "input_length": 3, "output_length": 7, "hash_ids": [1, 2]}\n'
    '{"timestamp": 6500, "input_length": 4, "output_length": 8, "hash_ids": [1]}\n',
}


def _read(tmp_path: Path, name: str, text: str, **options: object) -> ArrivalTrace:
    file = tmp_path / name
    file.write_text(text)
    return read_arrivals(file, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_public_formats_are_read(name: str, tmp_path: Path):
    trace = _read(tmp_path, name, FORMATS[name])
    assert trace.seconds.tolist() == [0.0, 1.5]
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([3, 4], [7, 8])


def test_what_is_written_is_read(tmp_path: Path):
    write_arrivals([(100.5, 3, 7), (102.0, 4, 8)], tmp_path / "t.jsonl")
    trace = read_arrivals(tmp_path / "t.jsonl")
    assert trace.seconds.tolist() == [0.0, 1.5]
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([3, 4], [7, 8])


def test_other_columns_are_told(tmp_path: Path):
    text = "when,in,out\n1,2,3\n"
    trace = _read(tmp_path, "t.csv", text, columns={"time": "when", "prompt": "in", "output": "out"})
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([2], [3])
    with pytest.raises(UserError, match=r"no column t_s or .* among when, in, out; give --columns time=NAME"):
        read_arrivals(tmp_path / "t.csv")


def test_requests_are_sorted_and_failed_ones_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = _read(tmp_path, "t.csv", "t_s,prompt_tokens,output_tokens\n9,1,1\n4,2,2\n6,3,0\n")
    assert trace.seconds.tolist() == [0.0, 5.0]
    assert trace.prompt.tolist() == [2, 1]
    assert "left out 1 requests without prompt or answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.txt", "", "must end in .jsonl or .csv"),
        ("t.csv", "", "cannot be read as a trace"),
        ("t.jsonl", "{", "cannot be read as a trace"),
        ("t.csv", "t_s,prompt_tokens,output_tokens\n", "holds no request"),
        ("t.csv", "t_s,prompt_tokens,output_tokens\n1,2,x\n", "row 1: output_tokens 'x' is not a number"),
        ("t.csv", "t_s,prompt_tokens,output_tokens\nsoon,2,1\n", "row 1: t_s 'soon' is neither a number nor a date"),
        ("t.csv", "t_s,prompt_tokens,output_tokens\n1,0,1\n", "no request has a prompt and an answer"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, text: str, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        _read(tmp_path, name, text)
    with pytest.raises(UserError, match=r"nowhere\.csv: cannot be read"):
        read_arrivals(tmp_path / "nowhere.csv")


def test_a_trace_is_repeated_and_made_faster():
    trace = ArrivalTrace(np.array([0.0, 1.0, 4.0]), np.array([1, 2, 3]), np.array([4, 5, 6]))
    again = trace.repeated(7)
    assert again.seconds.tolist() == [0, 1, 4, 6, 7, 10, 12]  # the mean gap is 2
    assert again.prompt.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert trace.repeated(2).output.tolist() == [4, 5]
    assert trace.faster(2).seconds.tolist() == [0.0, 0.5, 2.0]
