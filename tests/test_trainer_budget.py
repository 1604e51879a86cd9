"""The trainer's share of the time, on a clock of the test's own."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.config import AuroraConfig, ConfigError, TrainerConfig, load_config
from trainer.budget import SILENCE_S, Budget, Load

BUSY, IDLE, DRIFT = Load(busy=True, drift=False), Load(busy=False, drift=False), Load(busy=True, drift=True)
SETTINGS = TrainerConfig(duty=0.25, drift_duty=0.75, drift_limit_s=100.0)


class Machine:
    """A trainer that works whenever it may, in units of a given length; hears a heartbeat every second."""

    def __init__(self, settings: TrainerConfig = SETTINGS) -> None:
        self.now = 0.0
        self.budget = Budget(settings, 0.0)
        self.worked: list[tuple[float, float]] = []

    def run(self, seconds: float, load: Load | None, unit_s: float = 0.5) -> float:
        """Let time pass; returns how much of it was computed. load: what the server keeps saying; None: nothing."""
        until, before = self.now + seconds, self.computed
        heartbeat = self.now
        while self.now < until:
            if load is not None and self.now >= heartbeat:
                self.budget.hear(load, self.now)
                heartbeat += 1.0
            rest = self.budget.rest_s(self.now)
            if rest > 0:
                self.now += min(max(rest, 1e-6), 0.25)
                continue
            self.budget.begin(self.now)
            self.worked.append((self.now, self.now + unit_s))
            self.now += unit_s
            self.budget.end(self.now)
        return self.computed - before

    @property
    def computed(self) -> float:
        return sum(end - begin for begin, end in self.worked)


def test_the_share_is_the_duty_under_load_and_all_when_idle():
    machine = Machine()
    assert machine.run(100, BUSY) == pytest.approx(25, abs=0.5)
    assert machine.run(100, IDLE) == pytest.approx(100, abs=2)
    assert machine.run(100, BUSY) == pytest.approx(25, abs=0.5)


def test_a_silent_server_counts_as_loaded():
    machine = Machine()
    assert machine.run(100, None) == pytest.approx(25, abs=0.5)
    machine.run(10, IDLE)
    assert machine.run(SILENCE_S - 2, None) > 0.9 * (SILENCE_S - 2)
    machine.run(2, None)
    assert machine.run(100, None) == pytest.approx(25, abs=1)


def test_drift_raises_the_share_until_the_gate_sees_no_more_gain():
    machine = Machine()
    machine.run(10, BUSY)
    assert machine.run(40, DRIFT) == pytest.approx(30, abs=1)
    machine.budget.gated(1.30, 1.20, machine.now)
    machine.budget.gated(1.30, 1.30, machine.now)
    machine.budget.gated(1.35, 1.30, machine.now)
    assert machine.budget.share(machine.now) == 0.75
    machine.budget.gated(1.35, 1.35, machine.now)
    assert machine.run(10, BUSY) == pytest.approx(7.5, abs=1), "a new version ends the word of drift, not the budget"
    machine.budget.gated(1.36, 1.35, machine.now)
    assert machine.budget.share(machine.now) == 0.25
    assert machine.run(40, DRIFT) == pytest.approx(30, abs=1), "the next drift raises it again"


def test_drift_raises_the_share_for_a_limited_time():
    machine = Machine()
    machine.run(100, DRIFT)
    assert machine.run(100, DRIFT) == pytest.approx(25, abs=1), "though the server still speaks of it"
    machine.run(1, BUSY)
    assert machine.run(40, DRIFT) == pytest.approx(30, abs=1)


def test_what_was_computed_is_told():
    machine = Machine()
    machine.run(400, IDLE)
    assert machine.budget.computed_share(machine.now) > 0.99
    machine.run(400, BUSY)
    assert machine.budget.computed_share(machine.now) == pytest.approx(0.25, abs=0.02)
    assert machine.budget.computed_loaded_s / machine.budget.loaded_s == pytest.approx(0.25, abs=0.01)
    assert machine.budget.loaded_s == pytest.approx(400, abs=2)


STRETCHES = st.lists(
    st.tuples(st.floats(0.1, 90), st.sampled_from([BUSY, IDLE, DRIFT, None]), st.floats(0.01, 5)), max_size=8
)


@given(STRETCHES, st.floats(0.05, 1.0), st.floats(1, 200))
def test_over_any_time_of_load_the_share_is_kept_within_one_unit(
    before: list[tuple[float, Load | None, float]], duty: float, seconds: float
):
    machine = Machine(TrainerConfig(duty=duty, drift_duty=1.0, drift_limit_s=20.0))
    for stretch in before:
        machine.run(*stretch)
    if machine.budget.raised(machine.now):
        machine.run(20, None)
    if not machine.budget._load.busy:
        machine.budget.hear(BUSY, machine.now)
    since = len(machine.worked)
    machine.run(seconds, BUSY)
    units = machine.worked[since:]
    for (i, (begin, _)), (j, (_, end)) in itertools.combinations(enumerate(units), 2):
        computed = sum(b - a for a, b in units[i : j + 1])
        assert computed <= duty * (end - begin) + (units[j][1] - units[j][0]) + 1e-5


def test_a_share_after_drift_below_the_usual_one_is_refused():
    with pytest.raises(ConfigError, match=r"drift_duty 0.2 is below duty 0.5: raise drift_duty"):
        load_config(None, {"trainer.duty": 0.5, "trainer.drift_duty": 0.2})
    assert AuroraConfig().trainer.drift_duty >= AuroraConfig().trainer.duty
