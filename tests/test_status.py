import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from rich.console import Console

from aurora.cli import main
from aurora.config import UserError
from aurora.drafter_records import VersionRecord
from aurora.growth import Look
from aurora.metrics import EngineReport
from aurora.scrape import parse_samples
from aurora.status import status
from aurora.status_view import Frame, one_line
from aurora.store import DrafterStore
from aurora.terminal_text import age, number, sparkline
from aurora.watch import Watch, WatchOptions
from serve.exporter import PrometheusExporter
from tests.local_http import serving
from tests.waiting import wait_until

FIRST = EngineReport(
    steps=10,
    request_steps=20,
    emitted_tokens=50,
    prefill_tokens=7,
    busy_s=1.0,
    draft_steps={0: 6, 2: 8, -1: 2},
    drafted_tokens={0: 12, 2: 24, -1: 4},
    accepted_tokens={0: 6, 2: 22, -1: 4},
    accepted_at={2: [8, 6]},
    verified_at={2: [8, 8]},
    k_histogram=[4, 0, 8, 8],
    predicted_goodput=40.0,
    step_error=0.1,
    traces=5,
    drafter_version=3,
    swaps=1,
    swap_s=0.25,
)


class Server:
    """An Aurora server's pages, from its own exporter; `begin` is what a restart does."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.well = self.up = True
        self.page: str | None = None  # instead of the exporter's
        self.begin(1.0)
        self.app = FastAPI()
        self.app.get("/metrics")(self._metrics)
        self.app.get("/ready")(self._ready)

    def begin(self, started_s: float) -> None:
        self.registry = CollectorRegistry()
        self.exporter = PrometheusExporter(self.registry)
        Gauge("process_start_time_seconds", "s", registry=self.registry).set(started_s)
        Gauge("vllm:num_requests_running", "n", ["model_name"], registry=self.registry).labels("org/tiny").set(3)
        Gauge("vllm:num_requests_waiting", "n", ["model_name"], registry=self.registry).labels("org/tiny").set(1)

    async def _metrics(self, request: Request) -> PlainTextResponse:
        if not self.up:
            return PlainTextResponse("the server restarts", 503)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return PlainTextResponse("no", 401)
        return PlainTextResponse(self.page if self.page is not None else generate_latest(self.registry))

    async def _ready(self) -> PlainTextResponse:
        return PlainTextResponse("", 200 if self.well and self.up else 503)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AURORA_API_KEY", raising=False)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Server, str]]:
    server = Server()
    with serving(server.app) as url:
        yield server, url


@pytest.fixture
def running(shared: tuple[Server, str]) -> tuple[Server, str]:
    server, url = shared
    server.key, server.page, server.well, server.up = None, None, True, True
    server.begin(1.0)
    return server, url


def watch(*urls: str, **options: object) -> tuple[Watch, Clock]:
    clock = Clock()
    return Watch(WatchOptions(urls=urls, **options), clock), clock


def look(report: EngineReport, time_s: float, replica: str = "") -> Look:
    registry = CollectorRegistry()
    PrometheusExporter(registry).update(report)
    return Look(time_s, parse_samples(generate_latest(registry).decode()), replica)


def test_rates_are_of_the_last_two_looks_and_mixes_of_all(running: tuple[Server, str]) -> None:
    server, url = running
    seen, clock = watch(url)
    seen.first_look()
    for _ in range(2):
        server.exporter.update(FIRST)
        clock.now_s += 2
        seen.look()
    frame = seen.frame("t")
    s = frame.whole
    assert (frame.state, frame.window_s, s.recent, s.restarted) == ("serving", 4, True, False)
    assert (s.tokens_per_s, s.prompt_tokens_per_s, s.steps_per_s, s.busy) == (25, 3.5, 5, 0.5)
    assert (s.goodput, s.predicted_goodput, s.step_time_error) == (50, 40, 0.1)
    assert (s.running, s.waiting, s.model) == (3, 1, "org/tiny")
    assert s.acceptance_length == 1 + 32 / 16
    assert s.acceptance_by_position == [1, 0.75]
    assert s.tokens_per_step == 2.6
    assert s.k_mix == {0: 0.2, 1: 0, 2: 0.4, 3: 0.4}
    assert s.drafter_mix == {"eagle3": 0.4, "table": 0.3, "model": 0.1, "none": 0.2}
    assert (s.versions.live, s.versions.swaps, s.versions.last_stall_s) == (3, 2, 0.25)
    assert s.training.staleness == 1
    assert frame.swapped_s == 0
    assert list(frame.speeds) == [None, 25, 25]


def test_one_look_tells_the_life_of_the_server_and_no_rate() -> None:
    s = status([[look(FIRST, 5.0)]])
    assert (s.tokens_per_s, s.recent, s.acceptance_length) == (None, False, 3)
    idle = status([[look(FIRST, 5.0), look(FIRST, 7.0)]])
    assert (idle.tokens_per_s, idle.recent, idle.acceptance_length) == (0, False, 3)
    assert status([[look(EngineReport(), 1.0)]]).acceptance_length is None


def test_what_the_trainer_does() -> None:
    fresh = status([[look(EngineReport(), 1.0)]]).training
    assert fresh.alive is None
    assert status([[look(FIRST, 1.0)]]).training.alive is False, "it was sent traces and never took one"


def test_a_restarted_server_counts_anew(running: tuple[Server, str]) -> None:
    server, url = running
    seen, clock = watch(url)
    server.exporter.update(FIRST)
    seen.first_look()
    server.begin(2.0)
    for _ in range(2):  # more than before: only the start time gives it away
        server.exporter.update(FIRST)
    clock.now_s += 2
    seen.look()
    assert seen.frame("t").whole.restarted
    assert seen.frame("t").whole.tokens_per_s == 50


counts = st.integers(0, 1000)
reports = st.builds(
    EngineReport,
    steps=counts,
    request_steps=counts,
    emitted_tokens=counts,
    prefill_tokens=counts,
    busy_s=st.floats(0, 100),
    draft_steps=st.dictionaries(st.integers(-3, 9), counts, max_size=3),
    drafted_tokens=st.dictionaries(st.integers(-3, 9), counts, max_size=3),
    accepted_tokens=st.dictionaries(st.integers(-3, 9), counts, max_size=3),
    k_histogram=st.lists(counts, max_size=5),
    traces=counts,
)


@settings(max_examples=25)
@given(st.lists(reports, min_size=2, max_size=4), st.integers(1, 2))
def test_no_rate_and_no_share_is_ever_negative(found: list[EngineReport], servers: int) -> None:
    s = status([[look(report, float(at)) for at, report in enumerate(found)]] * servers)
    rates = (s.tokens_per_s, s.prompt_tokens_per_s, s.steps_per_s, s.busy, s.training.traces_per_s)
    assert all(rate is not None and rate >= 0 for rate in rates)
    for mix in (s.k_mix, s.drafter_mix):
        assert all(share >= 0 for share in mix.values())
        assert not mix or sum(mix.values()) == pytest.approx(1)
    assert s.acceptance_length is None or s.acceptance_length >= 1


def test_replicas_add_up_and_stand_side_by_side() -> None:
    double = status([[look(FIRST, 1.0, r), look(FIRST, 3.0, r)] for r in ("a", "b")])
    single = status([[look(FIRST, 1.0), look(FIRST, 3.0)]])
    assert (double.replicas, double.goodput, double.versions.swaps) == (["a", "b"], 100, 2)
    assert (double.acceptance_length, double.k_mix) == (single.acceptance_length, single.k_mix)


def test_a_page_with_replicas_and_several_urls(running: tuple[Server, str]) -> None:
    server, url = running
    server.page = "".join(
        f'# TYPE {name} {kind}\n{name}{{replica="a"}} 4\n{name}{{replica="b"}} 6\n'
        for name, kind in (("aurora_drafter_version", "gauge"), ("aurora_emitted_tokens_total", "counter"))
    )
    seen, _ = watch(url)
    seen.first_look()
    assert [s.replicas for s in seen.frame("t").replicas] == [["a"], ["b"]]
    assert seen.frame("t").whole.versions.live == 6
    other = Server()
    with serving(other.app) as second:
        seen, _ = watch(url, second)
        seen.first_look()
        assert len(seen.frame("t").replicas) == 3
        other.up = False
        seen.look()
    frame = seen.frame("t")
    assert len(frame.replicas) == 2
    assert list(frame.silent) == [second.removeprefix("http://")]
    assert not frame.well


def test_a_server_that_is_away_is_asked_again(running: tuple[Server, str]) -> None:
    server, url = running
    server.exporter.update(FIRST)
    seen, clock = watch(url)
    seen.first_look()
    server.up = False
    clock.now_s += 2
    seen.look()
    frame = seen.frame("t")
    assert (frame.state, frame.whole.tokens_per_s, frame.well) == ("no answer", None, False)
    assert "no answer" in one_line(frame)
    server.up = True
    server.begin(2.0)
    server.exporter.update(FIRST)
    clock.now_s += 2
    seen.look()
    assert (seen.frame("t").state, seen.frame("t").whole.tokens_per_s) == ("serving", 12.5)


def refusal(url: str, **options: object) -> str:
    with pytest.raises(UserError) as refused:
        watch(url, **options)[0].first_look()
    return str(refused.value)


def test_what_is_no_aurora_server_is_refused(running: tuple[Server, str], tmp_path: Path) -> None:
    server, url = running
    assert "must begin with http" in refusal("localhost:8000")
    assert "--url http://[x" in refusal("http://[x")
    assert "no server answers" in refusal("http://127.0.0.1:9")
    server.page = "vllm:x 1\n"
    assert "--no-speculation" in refusal(url)
    server.page = "go_goroutines 1\n"
    assert "give the --url of an Aurora server" in refusal(url)
    server.page = "<html>hello</html>"
    assert "no metrics page" in refusal(url)
    assert "status 404" in refusal(f"{url}/nowhere")
    server.up = False
    assert "status 503" in refusal(url)
    assert "no drafters of kind eagle3" in refusal(url, run_dir=tmp_path)


def test_the_key_comes_from_the_environment_or_a_file(
    running: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = running
    server.key = "secret"
    assert "refuses the API key (HTTP 401)" in refusal(url)
    monkeypatch.setenv("AURORA_API_KEY", "secret")
    watch(url)[0].first_look()
    file = tmp_path / "key"
    file.write_text("wrong\n")
    assert "401" in refusal(url, api_key_file=file)
    file.write_text("secret\nother\n")
    watch(url, api_key_file=file)[0].first_look()
    assert "put a key on line 1" in refusal(url, api_key_file=tmp_path / "none")
    monkeypatch.setenv("AURORA_API_KEY", "sec\nret")
    assert "give a plain one" in refusal(url)


def test_status_says_it_once_and_by_its_exit_code(
    running: tuple[Server, str], capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = running
    server.exporter.update(FIRST)
    assert main(["status", "--url", url, "--interval", "0.01"]) == 0
    assert "3.00" in capsys.readouterr().out
    server.exporter.set("aurora_alarm", 1, kind="training_unsaved")
    assert main(["status", "--url", url, "--interval", "0.01", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["alarms"] == ["the disk takes neither versions nor checkpoints"]
    assert (told["acceptance_length"], told["versions"]["live"], told["state"]) == (3, 3, "serving")
    server.exporter.set("aurora_alarm", 0, kind="training_unsaved")
    server.well = False
    assert main(["status", "--url", url, "--interval", "0.01"]) == 1
    assert "not ready" in capsys.readouterr().out


def test_top_writes_a_line_a_look_where_there_is_no_terminal(
    running: tuple[Server, str], capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = running
    server.exporter.update(FIRST)
    assert main(["top", "--url", url, "--interval", "0.01", "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "acceptance 3.00" in lines[0]
    assert main(["top", "--url", url, "--interval", "0.01", "--count", "2", "--json"]) == 0
    assert [json.loads(line)["well"] for line in capsys.readouterr().out.splitlines()] == [True, True]
    assert main(["top", "--url", url, "--count", "0"]) == 2
    assert "--count 0" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error(running: tuple[Server, str]) -> None:
    _, url = running
    command = f"{sys.executable} -m aurora.cli top --url {url} --interval 0.01 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


class Terminal:
    """`aurora top` on a terminal of 24 x 80."""

    def __init__(self, url: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.set_blocking(self.master, False)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.screen = ""
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
        command = [sys.executable, "-m", "aurora.cli", "top", "--url", url, "--interval", "0.1"]
        mine = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        signal.signal(signal.SIGINT, mine)

    def shows(self, text: str) -> bool:
        with contextlib.suppress(BlockingIOError):
            while read := os.read(self.master, 65536):
                self.screen += read.decode(errors="replace")
        return text in self.screen

    def ended(self) -> int:
        wait_until(lambda: self.shows("\x1b[?1049l"), 60, "top left the terminal as it was")
        code = self.process.wait(20)
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.slave)
        os.close(self.master)
        return code


@pytest.mark.parametrize(("how", "code"), [("q", 0), (signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_top_ends_when_told_and_leaves_the_terminal_as_it_was(
    running: tuple[Server, str], how: str | signal.Signals, code: int
) -> None:
    server, url = running
    server.exporter.update(FIRST)
    terminal = Terminal(url)
    try:
        wait_until(lambda: terminal.shows("Alarms"), 60, "top shows its picture")
        if how == "q":
            os.write(terminal.master, b"q")
        else:
            terminal.process.send_signal(how)
        assert terminal.ended() == code
    finally:
        terminal.process.kill()


BIG = 12_345_678.0
WORST = {
    "title": "top  http://127.0.0.1:8000  q quits",
    "state": "not ready",
    "clock": "12:34:56",
    "window_s": 30.0,
    "speeds": [BIG * i for i in range(300)],
    "acceptance": [1 + i % 7 for i in range(300)],
    "swapped_s": 5999.0,
    "now_s": 5e6,
}


def worst() -> Frame:
    """Every value as long as it gets."""
    s = status([[look(FIRST, 0.0), look(FIRST, 2.0)]])
    trained = dataclasses.replace(s.training, alive=True, share=1.0, drift=True, traces_per_s=BIG, dropped=999_999)
    trained = dataclasses.replace(trained, unlogged=99_999, traces_waiting=999_999, staleness=63.25)
    versions = dataclasses.replace(
        s.versions, live=1234, draft_model=567, swaps=1234, rollbacks=999, swap_failures=999, last_stall_s=12.345
    )
    s = dataclasses.replace(
        s,
        model="org/a-model-with-quite-a-long-name-135M-Instruct",
        recent=True,
        tokens_per_s=BIG,
        prompt_tokens_per_s=BIG / 100,
        goodput=BIG / 100,
        predicted_goodput=BIG / 100,
        running=1024,
        waiting=9999,
        kv_cache=1.0,
        busy=1.0,
        acceptance_length=17.0,
        acceptance_by_position=[1.0] * 16,
        k_mix=dict.fromkeys(range(17), 1 / 17),
        refused=1_000_000,
        restarted=True,
        versions=versions,
        training=trained,
        alarms=["the disk takes neither versions nor checkpoints"],
    )
    records = [VersionRecord(n, "latest", "", 0.0, 1, 1233, "", 9, 9, 12.34, 12.3) for n in (1234, 1235)]
    return Frame(whole=s, store=records, **WORST)


def drawn(frame: Frame, width: int, height: int) -> list[str]:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=width, height=height, record=True, file=nowhere, force_terminal=True)
        console.print(frame.fitted(height))
        return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 60)])
def test_the_picture_is_whole(width: int, height: int) -> None:
    frame = worst()
    lines = drawn(frame, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines[1:]), "\n".join(lines)  # the header may shorten the model's name
    page = "\n".join(lines)
    for title in ("Speed", "Acceptance", "Speculation length", "Drafters", "Versions", "Trainer", "Alarms"):
        assert title in page
    for value in ("12,345,678 tok/s", "predicted 123,457", "17.00", "1,024 + 9,999", "999,999 + 99,999", "63.25"):
        assert value in page


@pytest.mark.parametrize(("width", "height", "shown"), [(80, 24, 2), (120, 40, 20)])
def test_replicas_that_do_not_fit_are_counted(width: int, height: int, shown: int) -> None:
    frame = worst()
    many = [dataclasses.replace(frame.whole, replicas=[f"10.0.0.{i}:8000"], tokens_per_s=99.0) for i in range(20)]
    calm = dataclasses.replace(frame.whole, alarms=[], refused=0, restarted=False)
    lines = drawn(dataclasses.replace(frame, whole=calm, replicas=many), width, height)
    assert len(lines) <= height
    names = re.findall(r"10\.0\.0\.\d+:8000", "\n".join(lines))
    more = re.findall(r"(\d+) more", "\n".join(lines))
    assert len(names) + sum(map(int, more)) == 20
    assert len(names) >= shown


def test_the_store_is_part_of_the_picture(running: tuple[Server, str], tmp_path: Path) -> None:
    server, url = running
    server.exporter.update(FIRST)
    store = DrafterStore(tmp_path / "drafters")
    for _ in range(4):
        store.publish(lambda d: d.joinpath("model.safetensors").touch(), {"acceptance_length": 2.5})
    store.reject(4, "worse than 3")
    seen, _ = watch(url, run_dir=tmp_path)
    seen.first_look()
    page = "\n".join(drawn(seen.frame("t"), 80, 24))
    assert "4 rejected: worse than 3" in page
    assert re.search(r"live +3, \d+ s old", page)


def test_without_unicode_there_are_no_blocks() -> None:
    assert sparkline([0, 0.5, None, 1], 9, " .#", low=0, high=1) == ".. #"[:2] + " #"
    assert sparkline([1, 2, 3], 2, low=0) == "▅█"
    assert sparkline([], 5, low=0) == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(-1, "0 s"), (5, "5 s"), (720, "12 min"), (12240, "3.4 h"), (300000, "3.5 d")]
)
def test_ages(seconds: float, said: str) -> None:
    assert age(seconds) == said


def test_numbers() -> None:
    assert [number(n) for n in (None, 0, 99.94, 1234.5)] == ["-", "0.0", "99.9", "1,234"]
