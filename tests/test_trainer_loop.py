import copy
import json
import logging
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import SafetensorError

from aurora.store import DrafterStore
from aurora.trace import DraftTrace, encode_traces, pack_states
from drafters import TargetWeights, load_drafter
from tests.tiny import TinyServer, half_right, prompts, tiny_config
from trainer.budget import Load
from trainer.checkpoint import FILE
from trainer.loop import TrainerLoop
from trainer.sinks import Sinks

STEPS = 80  # enough to beat the drafter of day 0 on held-out requests


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def traffic(directory: Path) -> list[DraftTrace]:
    server = TinyServer(directory)
    asked = list(enumerate(prompts(6))) * 4  # what is held out was also learned: random text teaches nothing else
    return [t for n, (i, p) in enumerate(asked) for t in server.traces(f"r{n}", p, 12, half_right, domain=f"d{i % 2}")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(directory: Path, run_dir: Path, clock: Clock, sinks: Sinks | None = None, **trainer: Any) -> TrainerLoop:
    return TrainerLoop(tiny_config(run_dir, **trainer), directory, sinks, clock)


def test_it_trains_gates_publishes_and_saves(directory: Path, traffic: list, tmp_path: Path, clock: Clock) -> None:
    told: list[tuple[str, int]] = []
    sinks = Sinks(
        lambda m, step: told.append(("gate" if "gate" in json.loads(json.dumps(m)) else "step", step)),
        lambda m, n: told.append(("v", n)),
    )
    loop = make(directory, tmp_path, clock, sinks, publish_interval_s=10)
    assert loop.ingest(encode_traces(traffic)) == len(traffic)
    for _ in range(STEPS):
        loop.work()
    assert loop.version == 1, "not due yet"
    clock.now = 11
    loop.work()
    assert loop.version == 2
    assert told[-2:] == [("gate", STEPS), ("v", 2)]
    assert [step for kind, step in told if kind == "step"] == list(range(1, STEPS + 1))
    version = DrafterStore(loop.config.store_dir).verify(2)
    assert version.metadata["parent"] == 1
    assert version.metadata["trainer_step"] == STEPS
    assert version.metadata["acceptance_length"] >= version.metadata["parent_acceptance_length"] >= 1.0
    assert len(version.metadata["acceptance_per_position"]) == 3
    published = load_drafter(version.path, TargetWeights.load(directory)).state_dict()
    assert all(torch.equal(published[name], t) for name, t in loop._learner.model.state_dict().items())
    assert (tmp_path / "trainer" / FILE).is_file()
    clock.now = 22
    loop.work()
    assert (loop._learner.steps, loop.version) == (STEPS + 1, 2), "without new steps there is nothing to gate"


@pytest.mark.parametrize("codec", ["int8", "compact"])
def test_compact_traces_teach_the_same_rows(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock, codec: str
) -> None:
    loops = [make(directory, tmp_path / name, clock) for name in ("bf16", codec)]
    loops[0].ingest(encode_traces(traffic))
    assert loops[1].ingest(encode_traces([pack_states(trace, codec) for trace in traffic])) == len(traffic)
    assert loops[0].status()["replay"] == loops[1].status()["replay"]
    for _ in range(STEPS):
        steps = [loop.train() for loop in loops]
    assert steps[1].rejected_rows == steps[0].rejected_rows > 0
    assert steps[1].loss == pytest.approx(steps[0].loss, rel=0.1)
    assert loops[1].publish() is not None


def test_a_payload_with_damaged_states_is_refused_whole(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock
) -> None:
    loop = make(directory, tmp_path, clock)
    good = pack_states(traffic[0], "compact")
    with pytest.raises(ValueError, match="contradict its"):
        loop.ingest(encode_traces([good, msgspec.structs.replace(good, hidden=good.hidden[:0], aux=good.aux[:0])]))
    assert loop.status()["replay"]["sequences"] == 0


def test_whoever_sees_a_version_can_count_on_its_training(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock
) -> None:
    resumed: list[int] = []
    loop = make(directory, tmp_path, clock, Sinks(version=lambda m, n: resumed.append(restarted().status()["step"])))

    def restarted() -> TrainerLoop:
        """A trainer in the place of one that was killed when it had just published."""
        return make(directory, tmp_path, clock)

    loop.ingest(encode_traces(traffic))
    for _ in range(STEPS):
        loop.train()
    assert loop.publish() is not None
    assert resumed == [STEPS]


def test_a_candidate_below_the_margin_stays_unpublished(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock
) -> None:
    loop = make(directory, tmp_path, clock, publish_interval_s=10, gate_margin=3.0)
    loop.ingest(encode_traces(traffic))
    loop.work()
    clock.now = 11
    loop.work()
    assert loop.version == 1
    assert loop.last_verdict is not None
    assert not loop.last_verdict.passed
    clock.now = 100
    loop.work()
    assert loop._learner.steps == 1, "the checkpoint is due first"
    loop.work()
    assert loop._learner.steps == 2


def test_without_held_out_traffic_nothing_is_published(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock
) -> None:
    loop = make(directory, tmp_path, clock, publish_interval_s=10, holdout=1e-9)
    loop.ingest(encode_traces(traffic))
    loop.work()
    clock.now = 11
    loop.work()
    assert (loop.version, loop.last_verdict) == (1, None)


def test_after_a_rollback_training_goes_on_from_the_version_that_serves(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock
) -> None:
    loop = make(directory, tmp_path, clock)
    loop.ingest(encode_traces(traffic))
    for _ in range(STEPS):
        loop.train()
    assert loop.publish() is not None
    store = DrafterStore(loop.config.store_dir)
    first = load_drafter(store.read(1).path, TargetWeights.load(directory)).state_dict()
    store.reject(2, "drafts worse than version 1")
    loop.publish()
    assert loop.version == 1
    assert all(torch.equal(t, first[name]) for name, t in loop.live.state_dict().items())
    for _ in range(STEPS):
        loop.train()
    published = loop.publish()
    assert published is not None
    assert published.number == 3
    assert published.metadata["parent"] == 1


def test_old_versions_are_pruned(directory: Path, traffic: list, tmp_path: Path, clock: Clock) -> None:
    loop = make(directory, tmp_path, clock, publish_interval_s=1, keep_versions=2)
    loop.ingest(encode_traces(traffic))
    for _ in range(4):
        for _ in range(15):
            loop.train()
        loop.publish()
    versions = DrafterStore(loop.config.store_dir).versions()
    assert len(versions) == 2
    assert versions[-1] == loop.version >= 3


def test_a_restart_goes_on_from_the_checkpoint(directory: Path, traffic: list, tmp_path: Path, clock: Clock) -> None:
    loop = make(directory, tmp_path, clock)
    loop.ingest(encode_traces(traffic))
    for _ in range(5):
        loop.work()
    loop.checkpoint()
    again = make(directory, tmp_path, clock)
    assert again.status()["step"] == 5
    again._replay = copy.deepcopy(loop._replay)
    assert again.train().loss == loop.train().loss


def test_a_damaged_checkpoint_falls_back_to_the_newest_version(
    directory: Path, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    make(directory, tmp_path, clock).checkpoint()
    (tmp_path / "trainer" / FILE).write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        loop = make(directory, tmp_path, clock)
    assert "damaged" in caplog.text
    assert (loop.version, loop.status()["step"]) == (1, 0)


def test_it_does_not_learn_a_small_replay_by_heart(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.MAX_PASSES", 2)
    loop = make(directory, tmp_path, clock)
    loop.ingest(encode_traces(traffic))
    for _ in range(50):
        loop.work()
    assert loop._learner.tokens >= 2 * loop._replay.received
    assert loop._learner.tokens < 2 * loop._replay.received + 64
    assert not loop._can_train


def test_the_thread_waits_for_traffic_and_stops_at_once(directory: Path, traffic: list, tmp_path: Path) -> None:
    stepped = threading.Event()
    loop = TrainerLoop(tiny_config(tmp_path), directory, Sinks(learning=lambda _m, _s: stepped.set()))
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert not stepped.wait(0.3)
    loop.ingest(encode_traces(traffic))
    assert stepped.wait(20)
    loop.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert (tmp_path / "trainer" / FILE).is_file()


def computed(directory: Path, run_dir: Path, traffic: list, load: Load, monkeypatch: pytest.MonkeyPatch) -> float:
    """Share of a minute that a loop with a duty of a quarter computes, a unit of work taking 2 s."""
    clock = Clock()
    loop = make(directory, run_dir, clock, duty=0.25, drift_duty=0.5, publish_interval_s=1e6)
    loop.ingest(encode_traces(traffic))
    units = 0

    def work() -> bool:
        nonlocal units
        clock.now += 2.0
        units += 1
        loop._stopped = clock.now >= 60
        return True

    def rest(seconds: float) -> None:
        loop._stopped = clock.now + seconds >= 60
        clock.now += min(seconds, 60 - clock.now)

    monkeypatch.setattr(loop, "work", work)
    monkeypatch.setattr(loop._changed, "wait", rest)
    loop.hear(load)
    loop.run()
    return 2.0 * units / 60


@pytest.mark.parametrize(
    ("busy", "drift", "share"), [(True, False, 0.25), (True, True, 0.5), (False, False, 0.5 + 0.5 * 0.25)]
)
def test_the_loop_keeps_to_its_budget(
    directory: Path,
    traffic: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    busy: bool,
    drift: bool,
    share: float,
) -> None:
    found = computed(directory, tmp_path, traffic, Load(busy, drift), monkeypatch)
    assert found == pytest.approx(share, abs=0.05), (
        "a server that was idle and then is silent for 30 s counts as loaded"
    )


def test_two_gates_without_gain_end_what_drift_began(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    loop = make(directory, tmp_path, clock, duty=0.25, drift_duty=0.5, gate_margin=3.0, learning_rate=1e-12)
    loop.ingest(encode_traces(traffic))
    with caplog.at_level(logging.INFO):
        loop.hear(Load(busy=True, drift=True))
    assert "up to 0.50 of the time" in caplog.text
    for expected in (0.5, 0.25):
        loop.train()
        loop.publish()
        assert loop.status()["allowed_share"] == expected


def test_passes_teach_the_replay_what_to_draw(directory: Path, traffic: list, tmp_path: Path, clock: Clock) -> None:
    loop = make(directory, tmp_path, clock)
    loop.ingest(encode_traces(traffic))
    first = loop.train()
    passed = [share for share in loop._replay._missed.values() if share is not None]
    assert 0 < len(passed) < len(loop._replay._missed)
    assert min(passed) <= 1.0 - first.acceptance_per_depth[0] <= max(passed)


def test_new_words_reach_the_draft_vocabulary(directory: Path, traffic: list, tmp_path: Path, clock: Clock) -> None:
    loop = make(directory, tmp_path, clock)
    loop.ingest(encode_traces(traffic))
    loop.train()
    missing = int((~loop._learner.model.t2d).nonzero()[0])
    loop._replay.emitted_counts[missing] += 1_000_000
    loop.publish()
    assert bool(loop._learner.model.t2d[missing])


def test_a_damaged_payload_is_refused(directory: Path, tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ValueError, match="not a trace payload"):
        make(directory, tmp_path, clock).ingest(b"\xc1")


def test_status_is_plain(directory: Path, traffic: list, tmp_path: Path, clock: Clock) -> None:
    loop = make(directory, tmp_path, clock)
    loop.ingest(encode_traces(traffic))
    loop.train()
    loop.publish()
    status = json.loads(json.dumps(loop.status()))
    assert status["step"] == 1
    assert status["replay"]["held_out"] > 0
    assert status["gate"]["candidate"]["rows"] > 0
    assert status["tokens_per_s"] > 0
    assert status["share_of_peak"] > 0


def test_a_full_disk_costs_versions_and_checkpoints_not_training(
    directory: Path, traffic: list, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    loop = make(directory, tmp_path, clock, publish_interval_s=10, checkpoint_interval_s=4)
    loop.ingest(encode_traces(traffic))
    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.save_file", full)
        for clock.now in range(STEPS):
            loop.work()
        assert loop.status()["unsaved"] == "I/O error: No space left on device (os error 28)"
        assert STEPS - 30 < loop.status()["step"] < STEPS - 15, "a try every four and ten seconds"
        assert DrafterStore(loop.config.store_dir).versions() == [1]
        assert list((tmp_path / "trainer").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("drafters.files.save_file", full)
        clock.now += 11
        loop.work()
        assert DrafterStore(loop.config.store_dir).versions() == [1]
        assert (tmp_path / "trainer" / FILE).is_file()
    for clock.now in range(100, 105):
        loop.work()
    assert (loop.version, loop.status()["unsaved"]) == (2, "")
    assert make(directory, tmp_path, clock).version == 2
