from msgspec.structs import replace

from serve.history import Hour, Point, Swap, Version
from serve.merged_history import SPAN_S, merged, span_start


def _point(time_s: float, **told: object) -> Point:
    usual = Point(
        time_s=time_s,
        speed_up=2.0,
        tokens_per_s=10.0,
        acceptance_length=2.0,
        emitted=40,
        plain_s=8.0,
        measured_s=4.0,
        draft_steps=20,
        accepted=20,
        domains={"sql": [40, 20]},
        sources={"target": 20, "ngram": 20},
        version=1,
    )
    return replace(usual, **told)


def _hour(*points: Point, **told: object) -> Hour:
    hour = Hour(now_s=100.0, points=list(points), swaps=[], versions=[], live={"eagle3": 1}, state={}, alarms={})
    return replace(hour, **told)


def _both(a: Hour, b: Hour, since_s: float = 0.0, now_s: float = 100.0, chosen: str = "") -> Hour:
    return merged({"a": a, "b": b}, [], since_s, now_s, chosen)


def test_counts_add_up_and_ratios_are_those_of_the_sums() -> None:
    slow = {"speed_up": 0.5, "tokens_per_s": 5.0, "acceptance_length": 1.0, "plain_s": 2.0, "accepted": 0}
    b = _hour(_point(18.0, **slow, emitted=20, domains={"sql": [10, 0], "tax": [5, 1]}, sources={"eagle3": 20}))
    (point,) = _both(_hour(_point(13.0)), b).points
    assert (point.time_s, point.emitted) == (20.0, 60)
    assert point.speed_up == (8.0 + 2.0) / (4.0 + 4.0), "not the mean of 2 and 0.5"
    assert point.acceptance_length == 1.5
    assert point.tokens_per_s == 15.0, "side by side"
    assert point.domains == {"sql": [50, 20], "tax": [5, 1]}
    assert point.sources == {"target": 20, "ngram": 20, "eagle3": 20}


def test_points_of_one_replica_follow_each_other() -> None:
    a = _hour(_point(12.0), _point(18.0, tokens_per_s=40.0))
    (point,) = merged({"a": a}, [], 0.0, 100.0).points
    assert point.tokens_per_s == 80 / (4.0 + 1.0)


def test_a_span_is_told_once_and_only_when_it_is_over() -> None:
    a, b = _hour(_point(13.0), _point(23.0)), _hour(_point(17.0), _point(20.0), _point(31.0))
    assert [(p.time_s, p.emitted) for p in _both(a, b, now_s=31.5).points] == [(20.0, 120)], "30 may still get more"
    assert [p.time_s for p in _both(a, b, since_s=20.0, now_s=33.0).points] == [30.0]
    assert [p.time_s for p in _both(a, b, since_s=20.0, now_s=43.0).points] == [30.0, 40.0]


def test_polls_add_up_to_what_one_look_sees() -> None:
    a = [_point(10 + 5.3 * i) for i in range(30)]
    b = [_point(12 + 7.1 * i, emitted=7) for i in range(20)]
    seen: list[Point] = []
    for now_s in range(10, 260, 3):
        since_s = seen[-1].time_s if seen else 0.0
        asked = span_start(since_s)
        hours = [_hour(*(p for p in points if asked < p.time_s <= now_s)) for points in (a, b)]
        seen += _both(*hours, since_s=since_s, now_s=float(now_s)).points
    assert seen == _both(_hour(*a), _hour(*b), now_s=260.0).points
    assert sum(p.emitted for p in seen) == 30 * 40 + 20 * 7
    assert all(p.time_s % SPAN_S == 0 for p in seen)


def test_each_replica_says_which_version_it_drafts_with() -> None:
    a = _hour(swaps=[Swap(5.0, "eagle3", 1, 2)], live={"eagle3": 2, "model": 1})
    b = _hour(swaps=[Swap(3.0, "eagle3", 0, 1)])
    hour = merged({"a": a, "b": b}, ["c"], 0.0, 100.0)
    assert hour.replicas == {"a": {"eagle3": 2, "model": 1}, "b": {"eagle3": 1}, "c": None}
    assert hour.live == {"eagle3": 2, "model": 1}
    assert [(swap.replica, swap.after) for swap in hour.swaps] == [("b", 1), ("a", 2)]


def test_a_version_that_several_stores_hold_is_one() -> None:
    first = Version("eagle3", 1, published_s=10.0, gated=1.5)
    mirrored = replace(first, published_s=12.0, rejected_s=20.0, reason="it drafts worse")
    both = Version("eagle3", 1, 10.0, 1.5, 20.0, "it drafts worse")
    second = Version("eagle3", 2, 30.0, None)
    assert _both(_hour(versions=[first, second]), _hour(versions=[mirrored])).versions == [both, second]
    assert _both(_hour(versions=[mirrored]), _hour(versions=[second, first])).versions == [both, second]


def test_counts_of_the_state_add_up_and_of_the_rest_the_worst_is_told() -> None:
    a = {"swaps_total": 2.0, "trainer_alive": 1.0, "drift": 0.0, "training_share": None, "traces_waiting": 3.0}
    b = {"swaps_total": 1.0, "trainer_alive": 0.0, "drift": 1.0, "training_share": None, "traces_waiting": None}
    expected = {"swaps_total": 3.0, "trainer_alive": 0.0, "drift": 1.0, "training_share": None, "traces_waiting": 3.0}
    state = _both(_hour(state=a), _hour(state=b)).state
    assert {name: state[name] for name in expected} == expected
    assert state["rollbacks_total"] is None, "nobody told"


def test_an_alarm_names_who_raised_it() -> None:
    off = {"speculation_off": "no drafts"}
    assert _both(_hour(alarms=off), _hour()).alarms == {"speculation_off": "no drafts (a)"}
    assert _both(_hour(alarms=off), _hour(alarms=off)).alarms == {"speculation_off": "no drafts (a, b)"}


def test_one_replica_alone_is_shown_as_it_says_itself() -> None:
    a, b = _hour(_point(11.0), _point(13.0)), _hour(_point(12.0), alarms={"speculation_off": "no drafts"})
    hour = _both(a, b, since_s=11.0, chosen="a")
    assert (hour.replica, hour.points, hour.alarms) == ("a", [_point(13.0)], {})
    assert set(hour.replicas) == {"a", "b"}
    assert _both(a, b, chosen="gone").replica == "", "all of them instead of one that has left"


def test_nobody_answers() -> None:
    hour = merged({}, ["a", "b"], 0.0, 100.0)
    assert (hour.points, hour.live, hour.replicas) == ([], {}, {"a": None, "b": None})
    assert hour.state["trainer_alive"] is None, "the page knows all of them"
