import argparse
import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from aurora.bench import measure, measured, run
from aurora.bench_options import ARMS, BenchOptions, Load, arms
from aurora.bench_result import BASELINE, BenchResult, Cell, Measurement, full_throughput
from aurora.cli import _parser
from aurora.config import AuroraConfig, UserError
from aurora.options import add_config_options, read_config
from aurora.prompts import Conversation
from aurora.sender import Record


def read_flags(flags: tuple[str, ...]) -> AuroraConfig:
    """The configuration that `aurora serve` makes of them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_options(parser)
    return read_config(*parser.parse_known_args(list(flags)))


def test_arms_are_serve_commands_with_one_difference(tmp_path: Path) -> None:
    options = BenchOptions(drafter=tmp_path, arms=(*ARMS, "fixed-7"), vllm_args=("--max-model-len=512",))
    chosen = arms(options)
    assert list(chosen) == [BASELINE, *ARMS, "fixed-7"]
    of_vllm = {BASELINE, "vllm-ngram", "vllm-batch-table"}
    for name, flags in chosen.items():
        assert "--max-model-len=512" in flags
        assert (f"--drafter={tmp_path}" in flags) == (name not in of_vllm)
        assert ("--no-speculation" in flags) == (name in of_vllm)
    assert len(set(chosen.values())) == len(chosen)
    assert read_flags(chosen["fixed-3"]).speculation.fixed_k == 3
    assert (s := read_flags(chosen["fixed-7"]).speculation).fixed_k == s.k_max == 7
    assert read_flags(chosen["table"]).speculation.drafters == ("ngram",)
    assert (s := read_flags(chosen["table-3"]).speculation).drafters == ("ngram",)
    assert s.fixed_k == 3
    table = read_flags(chosen["vllm-batch-table"]).vllm_args
    assert any('"num_speculative_tokens_per_batch_size": [[1, 1, 4], [2, 2, 3]' in argument for argument in table)
    assert any("prompt_lookup_max" in argument for argument in read_flags(chosen["vllm-ngram"]).vllm_args)


def test_an_unknown_arm_is_named() -> None:
    for unknown in ("warp", "fixed", "fixed-0", "fixed-17"):
        with pytest.raises(UserError, match=f"--arms {unknown}: no such arm; choose from fixed-3"):
            BenchOptions(arms=("table", unknown))
    with pytest.raises(UserError, match="--fixed-k: every arm would have it; name arms instead"):
        BenchOptions(vllm_args=("--fixed-k=3",))
    for load in (Load(0), Load(1, -1.0)):
        with pytest.raises(UserError, match=f"--concurrency {load.concurrency}@{load.temperature:g}: at least 1"):
            BenchOptions(loads=(Load(1), load))
    for table in ((), ((2, 1),), ((1, 3), (1, 2)), ((1, -1),), ((1, 0), (4, 0))):
        with pytest.raises(UserError, match=r"--batch-table .*: must rise from 1"):
            BenchOptions(batch_table=table)
    with pytest.raises(UserError, match="--dataset: sql names two data sets; rename one"):
        BenchOptions(datasets=("a/sql.jsonl", "b.jsonl", "c/sql.jsonl"))
    with pytest.raises(UserError, match="--cell x: names one data set; there are 2"):
        BenchOptions(datasets=("a.jsonl", "b.jsonl"), cell="x")


def test_ratios_compare_within_a_round() -> None:
    speeds = {(BASELINE, 1): 10.0, ("x", 1): 20.0, (BASELINE, 2): 100.0, ("x", 2): 150.0}
    result = BenchResult(
        [Measurement("d", 1, 0.0, arm, r, speed, None, 5, (0.5, 1.0 / speed)) for (arm, r), speed in speeds.items()]
    )
    assert result.ratios("x", Cell("d", 1, 0.0)) == [2.0, 1.5]
    rows = {row["arm"]: row for row in result.rows()}
    assert rows["x"]["ratio"] == 1.75
    assert rows[BASELINE]["ratio"] == 1.0
    assert (rows["x"]["ratio_min"], rows["x"]["ratio_max"]) == (1.5, 2.0)


def test_throughput_is_that_of_a_full_server() -> None:
    """Two may be open: when the third has ended, after 4 s, the fourth still says half of what it has to say."""
    times = {0.0: (2.0, 1.0), 0.001: (1.999, 0.999), 2.0: (2.0, 1.0), 2.001: (4.0, 0.999)}  # start: latency, ttft
    records = [Record(latency, ttft, 8, None, 1, start) for start, (latency, ttft) in times.items()]
    assert full_throughput(records) == pytest.approx((8 + 8 + 8 + 8 / 3) / 4, rel=0.01)
    assert full_throughput(records[:1]) == pytest.approx(4)
    assert full_throughput([Record(2.0, None, 8, None, 1, 0.0)]) == 4, "one that came all at once"
    alike = [Record(3.0, 1.0, 8, None, 1, start) for start in (0.0, 0.0, 3.0, 3.0)]
    assert full_throughput(alike) == 32 / 6


def test_published_rows_compare_with_both_baselines() -> None:
    speeds = {BASELINE: 10.0, "vllm-ngram": 20.0, "portfolio": 30.0}
    result = BenchResult(
        [Measurement("d", 4, 0.5, arm, 1, speed, None, 5, (1.0, 2.0, speed)) for arm, speed in speeds.items()]
    )
    found = {(row.policy, row.metric): (row.value, row.baseline) for row in result.published("live", "sql")}
    assert found["portfolio", "ratio_to_best_fixed"] == (1.5, 20.0)
    assert found["portfolio", "speedup_over_vllm_ngram"] == (1.5, 20.0)
    assert found["portfolio", "speedup_over_no_speculation"] == (3.0, 10.0)
    assert found["no_speculation", "tokens_per_s"] == (10.0, 10.0)
    assert ("no_speculation", "speedup_over_vllm_ngram") not in found
    assert found["portfolio", "latency_p50_s"] == (2.0, 2.0)
    assert found["vllm_ngram", "latency_p99_s"] == (pytest.approx(19.64), pytest.approx(9.84))
    assert {row.cell for row in result.published("live", "sql")} == {"sql, 4 at once, temperature 0.5"}
    assert {row.cell for row in result.published("live")} == {"d, 4 at once, temperature 0.5"}


@pytest.mark.parametrize(("field", "value"), [("rounds", 0), ("max_tokens", -1), ("requests", 0)])
def test_values_that_make_no_sense(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} .* above 0"):
        BenchOptions(**{field: value})


class _Endpoint(BaseHTTPRequestHandler):
    """Enough of the OpenAI API to be measured; notes every prompt."""

    seen: list[tuple[int, str]]
    temperatures: set[float]

    def do_GET(self) -> None:
        self._answer(json.dumps({"object": "list", "data": [{"id": "m"}]}) if "models" in self.path else "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.server.server_address[1], body["messages"][-1]["content"]))
        self.temperatures.add(body["temperature"])
        choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        chunks = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        lines = [f"data: {json.dumps(head | chunk)}\n\n" for chunk in chunks]
        self._answer("".join(lines) + "data: [DONE]\n\n", "text/event-stream")

    def _answer(self, text: str, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def urls() -> Iterator[dict[str, str]]:
    """Two endpoints: the baseline and x."""
    _Endpoint.seen, _Endpoint.temperatures = [], set()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint) for _ in range(2)]
    for server in servers:
        Thread(target=server.serve_forever, daemon=True).start()
    yield {name: f"http://127.0.0.1:{s.server_address[1]}" for name, s in zip((BASELINE, "x"), servers, strict=True)}
    for server in servers:
        server.shutdown()
        server.server_close()


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def test_every_arm_gets_the_same_prompts_in_turning_order(urls: dict[str, str]) -> None:
    prompts = [Conversation((f"p{i}",)) for i in range(5)]
    told: list[tuple[str, bool]] = []
    options = BenchOptions(rounds=2, requests=2, loads=(Load(1),))
    result = asyncio.run(measure(urls, {"d": prompts}, options, lambda name, yes: told.append((name, yes))))
    ports = [_port(url) for url in urls.values()]
    texts = {port: [text for p, text in _Endpoint.seen if p == port] for port in ports}
    assert texts[ports[0]] == texts[ports[1]] == ["p0", "p1", "p2", "p3", "p4"], "one to warm up, two a round"
    order = [port for port, _ in _Endpoint.seen]
    assert order == [ports[i] for i in (0, 1, 1, 1, 0, 0, 0, 0, 1, 1)]
    turns = [BASELINE, "x", "x", BASELINE, BASELINE, "x"]
    assert told == [(name, yes) for name in turns for yes in (True, False)], "the trainer of whoever is asked computes"
    assert [(m.round, m.tokens) for m in result.measurements] == [(1, 14)] * 2 + [(2, 14)] * 2
    assert all(len(m.latency_s) == 2 and min(m.latency_s) > 0 for m in result.measurements)


def test_what_one_load_was_sent_is_not_sent_with_another(urls: dict[str, str]) -> None:
    """Answers that a table has learned would flatter it."""
    prompts = {name: [Conversation((f"{name}{i}",)) for i in range(20)] for name in "ab"}
    options = BenchOptions(rounds=1, requests=1, loads=(Load(3), Load(1), Load(2, 0.5)))
    result = asyncio.run(measure(urls, prompts, options))
    mine = [text for port, text in _Endpoint.seen if port == _port(urls["x"])]
    assert sorted(mine, key=lambda text: (text[0], int(text[1:]))) == [f"{n}{i}" for n in "ab" for i in range(12)]
    assert result.cells == [Cell(name, *load) for name in "ab" for load in options.loads]
    assert _Endpoint.temperatures == {0.0, 0.5}


def test_a_bench_that_was_cut_off_goes_on(urls: dict[str, str], tmp_path: Path) -> None:
    prompts = [Conversation((f"p{i}",)) for i in range(6)]
    file = tmp_path / "bench.json"
    options = BenchOptions(rounds=1, requests=2, loads=(Load(1),), json_file=file)
    first = asyncio.run(measure(urls, {"d": prompts}, options)).measurements
    more = replace(options, rounds=2)
    assert measured(more).measurements == first
    _Endpoint.seen = []
    result = asyncio.run(measure(urls, {"d": prompts}, more, before=measured(more)))
    warm_up, last = ["p0"], ["p3", "p4"]
    assert [text for _, text in _Endpoint.seen] == [*warm_up * 2, *last * 2], "the first round is not sent again"
    assert result.measurements[:2] == first
    assert measured(more) == result
    with pytest.raises(UserError, match="holds a bench with another --max-tokens; give another file"):
        measured(replace(more, max_tokens=9))
    for changed, flag in (({"loads": (Load(2),)}, "concurrency"), ({"datasets": ("x",)}, "dataset")):
        with pytest.raises(UserError, match=f"holds a bench with another --{flag};"):
            measured(replace(more, **changed))
    for broken in ("", "[]", '{"rounds": [{"arm": "x"}]}', '{"rounds": [], "step_costs": {}, "options": []}'):
        file.write_text(broken)
        with pytest.raises(UserError, match="exists and is no bench to go on with"):
            measured(more)


def test_a_bench_that_is_complete_is_shown_again(urls: dict[str, str], tmp_path: Path) -> None:
    data, file, rows = tmp_path / "d.jsonl", tmp_path / "bench.json", tmp_path / "results.json"
    data.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(3)))
    options = BenchOptions(
        datasets=(str(data),), arms=("table",), rounds=1, requests=1, loads=(Load(1),), json_file=file, results=rows
    )
    servers = {BASELINE: urls[BASELINE], "table": urls["x"]}
    asyncio.run(measure(servers, {"d": [Conversation((f"p{i}",)) for i in range(3)]}, options))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step_costs": {"constant": 0.5}}))
    _Endpoint.seen = []
    assert run(options) == 0
    assert not _Endpoint.seen
    assert measured(options).step_costs == {"constant": 0.5}
    assert {row["policy"] for row in json.loads(rows.read_text())} == {"no_speculation", "table"}


def test_endpoints_that_run_are_compared_with_the_first(urls: dict[str, str], tmp_path: Path) -> None:
    """Whatever serves them: these have no counters, and one keeps its own name for the baseline."""
    file, page = tmp_path / "bench.json", tmp_path / "report.html"
    endpoints = (("theirs", urls[BASELINE]), ("ours", urls["x"]))
    options = BenchOptions(urls=endpoints, rounds=2, requests=1, loads=(Load(1),), json_file=file, html=page)
    assert run(options) == 0
    order = [port for port, _ in _Endpoint.seen]
    theirs, ours = (_port(url) for _, url in endpoints)
    assert order == [theirs, ours, ours, theirs, theirs, ours], "a warm-up, then two rounds in turn"
    result = measured(options)
    assert result.baseline == "theirs"
    assert [row["arm"] for row in result.rows()] == ["theirs", "ours"]
    assert {row["ratio"] for row in result.rows() if row["arm"] == "theirs"} == {1.0}
    assert page.read_text().startswith("<!DOCTYPE html>")
    _Endpoint.seen = []
    assert run(replace(options, rounds=1)) == 0
    assert not _Endpoint.seen, "what is complete is not sent again"
    with pytest.raises(UserError, match="holds a bench with another --url;"):
        measured(replace(options, urls=(*endpoints, ("third", urls["x"]))))


def test_endpoints_that_cannot_be_compared() -> None:
    one, other = ("a", "http://127.0.0.1:1"), ("b", "http://127.0.0.1:2")
    for wrong in ((one,), (one, ("a", "http://127.0.0.1:2"))):
        with pytest.raises(UserError, match=r"--url a.*: give two endpoints or more, each with a name of its own"):
            BenchOptions(urls=wrong)
    with pytest.raises(UserError, match="--url b=ftp://x: no URL"):
        BenchOptions(urls=(one, ("b", "ftp://x")))
    with pytest.raises(UserError, match="--max-model-len=9: nothing is started with --url"):
        BenchOptions(urls=(one, other), vllm_args=("--max-model-len=9",))
    with pytest.raises(UserError, match="--drafter: nothing is started with --url"):
        BenchOptions(urls=(one, other), drafter=Path("d"))
    with pytest.raises(UserError, match=r"http://127.0.0.1:1: lists no model \(.*\); start it, or correct --url"):
        run(BenchOptions(urls=(one, other), rounds=1))


def test_urls_are_taken_with_or_without_their_version() -> None:
    known = _parser().parse_args(["bench", "--url", "a=http://h:1/v1/", "--url", "b=http://h:2"])
    assert known.urls == [("a", "http://h:1"), ("b", "http://h:2")]
    with pytest.raises(SystemExit, match="2"):
        _parser().parse_args(["bench", "--url", "http:"])
