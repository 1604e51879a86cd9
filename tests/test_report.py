import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.bench import _keep
from aurora.bench_options import BenchOptions, Load
from aurora.bench_result import BASELINE, BenchResult, Measurement
from aurora.cli import main
from aurora.config import UserError
from aurora.report import ReportOptions, read_run, run
from aurora.results import change_interval, median_interval
from aurora.sender import Record
from aurora.traffic_result import summarise, write_json

SPEEDS = {BASELINE: (10.0, 12.0, 11.0), "portfolio": (15.0, 16.0, 17.0)}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}


class Page(HTMLParser):
    """What a page would load, its tags, the text of its cells and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in LOADING]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            continue

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def write_bench(file: Path, speeds: dict[str, tuple[float, ...]], dataset: str = "sql", factor: float = 1.0) -> Path:
    """A run as `aurora bench --json` keeps it: `factor` times as fast as `speeds` say, by arm and round."""
    rounds = [
        Measurement(dataset, 4, 0.0, arm, number, factor * speed, None, 50, (1.0 / speed, 2.0 / speed))
        for arm, mine in speeds.items()
        for number, speed in enumerate(mine, 1)
    ]
    result = BenchResult(rounds, {"constant": 0.01})
    loads, table = (Load(4), Load(2, 0.7)), ((1, 3), (8, 0))
    _keep(result, BenchOptions(json_file=file, loads=loads, arms=("portfolio",), batch_table=table), result.rows())
    return file


def write_traffic(file: Path, seconds: float) -> Path:
    records = [Record(seconds / 10, seconds / 40, 20, None, 5, float(i)) for i in range(8)]
    write_json(summarise([*records, Record(1.0, error="<b>refused</b>")], [], seconds), file)
    return file


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert run(ReportOptions((write_bench(tmp_path / "run.json", SPEEDS),), out)) == 0
    page = Page(out.read_text())
    assert all(target.startswith("#") for target in page.loads), page.loads
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert "http" not in out.read_text().replace(str(tmp_path), "")
    assert "@import" not in out.read_text()
    assert page.tags.count("svg") == 3, "ratios of all cells, speeds and latencies of the one"
    assert "sql, 4 at once" in page.texts["h3"]
    assert {"portfolio", BASELINE, "tokens/s", "latency of a request, s"} <= set(page.texts["text"])
    assert {"Configuration", "Versions"} <= set(page.texts["h3"])
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert {"torch", "python"} <= set(facts)
    said = {"loads": "4, 2@0.7", "arms": "portfolio", "batch_table": "1:3, 8:0", "drafter": "-", "max_tokens": "64"}
    assert facts | said == facts, "as the flags have them"
    (ratio,) = [cell for cell in page.texts["td"] if cell == "1.500"]
    place = page.texts["td"].index(ratio)
    assert page.texts["td"][place + 1 : place + 3] == ["1.333 - 1.545", "1.333 - 1.545"]


def test_runs_are_compared_by_cell_and_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_bench(tmp_path / "a.json", SPEEDS)
    second = write_bench(tmp_path / "b.json", {BASELINE: SPEEDS[BASELINE], "portfolio": (30.0, 32.0, 34.0)}, factor=0.5)
    out = tmp_path / "report.html"
    assert main(["report", str(first), str(second), "--html", str(out)]) == 0
    page = Page(out.read_text())
    assert page.texts["h2"] == ["Comparison", str(first), str(second)]
    cells = page.texts["td"]
    mine = cells[cells.index("portfolio") - 1 :][:5]
    assert mine[0] == "sql, 4 at once"
    assert mine[2].startswith("1.500 (")
    assert mine[3].startswith("3.000 (")
    assert mine[4].startswith("16.0, x 1.000 (")
    assert str(out) in capsys.readouterr().out


def test_traffic_is_compared_number_by_number(tmp_path: Path) -> None:
    files = (write_traffic(tmp_path / "a.json", 10.0), write_traffic(tmp_path / "b.json", 5.0))
    out = tmp_path / "report.html"
    assert run(ReportOptions(files, out)) == 0
    page = Page(out.read_text())
    cells = page.texts["td"]
    place = cells.index("tokens per s")
    assert cells[place + 1 : place + 3] == ["16.000", "32.000 (x 2.000)"]
    assert "b" not in page.tags, "what a server answered is text"


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    bench, traffic = write_bench(tmp_path / "bench.json", SPEEDS), write_traffic(tmp_path / "traffic.json", 5.0)
    with pytest.raises(UserError, match=r"bench.json is a bench, .*traffic.json is traffic; compare runs of one kind"):
        run(ReportOptions((traffic, bench)))
    with pytest.raises(UserError, match="no prompts and arm that all of them measured"):
        run(ReportOptions((bench, write_bench(tmp_path / "other.json", SPEEDS, "gsm8k"))))
    broken = tmp_path / "broken.json"
    contents = (
        "",
        "[]",
        "{}",
        "7",
        '{"rounds": 3}',
        '{"rounds": [], "step_costs": {}, "options": {}}',
        '{"rounds": [1]}',
    )
    for content in contents:
        broken.write_text(content)
        with pytest.raises(UserError, match=r"broken.json: .*; give files that `aurora bench --json`"):
            read_run(broken)
    with pytest.raises(UserError, match=r"missing.json: No such file or directory; give files"):
        read_run(tmp_path / "missing.json")
    with pytest.raises(UserError, match=r"--html .*: no such directory"):
        ReportOptions((bench,), tmp_path / "no" / "out.html")


def test_a_run_that_was_cut_off_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    file = write_bench(tmp_path / "run.json", {BASELINE: (10.0, 11.0), "portfolio": (12.0,)})
    kept = json.loads(file.read_text())
    kept["rounds"].append(asdict(Measurement("other", 1, 0.0, BASELINE, 1, 9.0, None, 5, (1.0,))))
    file.write_text(json.dumps(kept))
    assert run(ReportOptions((file,), tmp_path / "out.html")) == 0


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12))
def test_the_interval_of_the_median_lies_within_the_range(values: list[float]) -> None:
    found = median_interval(values)
    assert found is not None
    low, high = found
    rounding = 1e-12 * max(values)  # percentiles are interpolated
    assert min(values) - rounding <= low <= high + rounding <= max(values) + 2 * rounding


def test_intervals_narrow_with_rounds_and_say_nothing_of_one() -> None:
    few, many = [1.0, 1.2, 1.4], [1.0, 1.2, 1.4] * 20
    (a, b), (c, d) = median_interval(few), median_interval(many)
    assert (a, b) == (1.0, 1.4)
    assert a < c <= 1.2 <= d < b
    assert median_interval([1.0]) is None
    assert median_interval([2.0, 2.0]) == (2.0, 2.0)
    assert change_interval([1.0, 1.0], [3.0, 3.0]) == (3.0, 3.0)
    assert change_interval([1.0], [3.0, 3.0]) is None
    low, high = change_interval([9.0, 10.0, 11.0], [20.0, 21.0, 19.0])
    assert low == 19 / 11 < 2.0 < high == 21 / 9
