"""What servers do, from two or more looks at their /metrics pages: pure, and the same for people and for `--json`.

Rates are differences over the last two looks; mixes and acceptance over all looks given, or since the servers' start
where nothing happened between them. A counter that fell began again at 0: its server restarted, and no rate is ever
negative. A page lags its engine by the collection interval, half a second under load and ten idle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aurora.config import UserError
from aurora.growth import Growth, Look, gauge, restarted
from aurora.metrics import METRICS
from aurora.scrape import Samples
from aurora.trace import TABLE_VERSION

NEURAL, TABLE, MODEL, NO_DRAFT = "eagle3", "table", "model", "none"
_RUNNING = "vllm:num_requests_running"
_ALARMS = {
    "drafter_never_right": "the live drafter's drafts are never right",
    "speculation_off": "the neural drafter no longer drafts",
    "training_unsaved": "the disk takes neither versions nor checkpoints",
}
_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True)
class Versions:
    """Drafter versions, as the servers count them; of several servers those of the newest live version."""

    live: int | None
    draft_model: int | None
    swaps: int
    swap_failures: int
    rollbacks: int
    last_stall_s: float | None  # engine stall of the last swap; None before the first


@dataclass(frozen=True)
class Training:
    """What the servers know of their trainer."""

    alive: bool | None  # None: it was never sent a trace
    share: float  # of wall time that it computes
    drift: bool
    traces_per_s: float | None
    traces_waiting: int
    dropped: int
    unlogged: int
    staleness: float | None  # versions that the verified neural drafts were behind the live one, mean


@dataclass(frozen=True)
class Status:
    """One server, or all replicas together. None: not known (yet)."""

    replicas: list[str]
    model: str
    restarted: bool  # one of them, between the last two looks
    recent: bool  # whether mixes and acceptance are of the looks; else since the start
    tokens_per_s: float | None  # emitted, a second of wall time
    prompt_tokens_per_s: float | None
    steps_per_s: float | None
    busy: float | None  # share of wall time that an engine computes
    running: int | None  # requests
    waiting: int | None
    kv_cache: float | None  # share used, where it is fullest
    refused: int  # requests answered 503 since the start
    goodput: float | None  # emitted tokens a second of engine time, measured
    predicted_goodput: float | None
    step_time_error: float | None  # median, relative
    acceptance_length: float | None
    acceptance_by_position: list[float]
    tokens_per_step: float | None  # of a request, undrafted steps included
    k_mix: dict[int, float]  # k -> share of request steps
    drafter_mix: dict[str, float]  # eagle3, table, model, none -> share of request steps
    versions: Versions
    training: Training
    alarms: list[str]


def check_aurora(samples: Samples, url: str) -> None:
    """Raise UserError unless a page is that of an Aurora server which speculates."""
    if any(name in METRICS for name in samples):
        return
    if any(name.startswith("vllm:") for name in samples):
        raise UserError(
            f"{url}: vLLM's metrics and none of Aurora's; this is plain vLLM, or `aurora serve --no-speculation`"
        )
    raise UserError(f"{url}: no metrics of Aurora's; give the --url of an Aurora server")


def status(histories: Sequence[Sequence[Look]]) -> Status:
    """The status of servers from the looks at each, oldest first; with one look each there are no rates."""
    lasts = [looks[-1] for looks in histories]
    step = Growth.over([(looks[-2], looks[-1]) for looks in histories if len(looks) > 1])
    window = Growth.over([(looks[0], looks[-1]) for looks in histories if len(looks) > 1])
    recent = window.total("aurora_request_steps_total") > 0
    if not recent:
        window = Growth.over([(Look(0.0, {}), look) for look in lasts])
    return Status(
        replicas=[look.replica for look in lasts],
        model=" ".join(
            sorted({dict(labels).get("model_name", "") for s in lasts for labels in s.samples.get(_RUNNING, {})})
        ),
        restarted=any(len(looks) > 1 and restarted(looks[-2], looks[-1]) for looks in histories),
        recent=recent,
        tokens_per_s=step.rate("aurora_emitted_tokens_total"),
        prompt_tokens_per_s=step.rate("aurora_prefill_tokens_total"),
        steps_per_s=step.rate("aurora_steps_total"),
        busy=_busy(step, len(lasts)),
        running=_whole(gauge(lasts, _RUNNING, sum)),
        waiting=_whole(gauge(lasts, "vllm:num_requests_waiting", sum)),
        kv_cache=gauge(lasts, "vllm:kv_cache_usage_perc", max),
        refused=_count(lasts, "aurora_requests_refused_total"),
        goodput=gauge(lasts, "aurora_goodput_tokens_per_s", sum) or None,
        predicted_goodput=gauge(lasts, "aurora_predicted_goodput_tokens_per_s", sum) or None,
        step_time_error=gauge(lasts, "aurora_step_time_error", max) or None,
        acceptance_length=acceptance(window),
        acceptance_by_position=_by_position(window),
        tokens_per_step=_one_and(window, "aurora_request_steps_total"),
        k_mix=_shares({int(k): n for k, n in window.by("aurora_k_total", "k").items()}),
        drafter_mix=_drafters(window),
        versions=_versions(lasts),
        training=_training(lasts, step, window),
        alarms=_alarms(lasts),
    )


def latest_acceptance(looks: Sequence[Look]) -> float | None:
    """Acceptance length of what was drafted between the last two looks."""
    return acceptance(Growth.over([(looks[-2], looks[-1])])) if len(looks) > 1 else None


def acceptance(growth: Growth) -> float | None:
    """1 + accepted drafts / verification steps with drafts; None without such steps."""
    return _one_and(growth, "aurora_draft_steps_total")


def _one_and(growth: Growth, steps: str) -> float | None:
    """The target's own token and the accepted drafts of a step."""
    accepted = growth.ratio("aurora_accepted_tokens_total", steps)
    return None if accepted is None else 1 + accepted


def acceptance_by_version(samples: Samples) -> dict[int, float | None]:
    """The acceptance length of each version (negative: the draft model's) since the server's start."""
    life = Growth.over([(Look(0.0, {}), Look(0.0, samples))])
    accepted = life.by("aurora_accepted_tokens_total", "version")
    steps = life.by("aurora_draft_steps_total", "version")
    return {int(v): 1 + accepted.get(v, 0.0) / n if n else None for v, n in steps.items()}


def _by_position(growth: Growth) -> list[float]:
    verified, accepted = (growth.by(f"aurora_{what}_at_total", "position") for what in ("verified", "accepted"))
    return [accepted.get(p, 0.0) / verified[p] for p in sorted(verified, key=int) if verified[p]]


def _drafters(growth: Growth) -> dict[str, float]:
    """Shares of the request steps that each drafter drafted for."""
    counts = dict.fromkeys((NEURAL, TABLE, MODEL), 0.0)
    for version, steps in growth.by("aurora_draft_steps_total", "version").items():
        counts[_drafter(int(version))] += steps
    undrafted = growth.total("aurora_request_steps_total") - sum(counts.values())
    return _shares({**counts, NO_DRAFT: max(undrafted, 0.0)})


def _drafter(version: int) -> str:
    if version == TABLE_VERSION:
        return TABLE
    return NEURAL if version > TABLE_VERSION else MODEL


def _shares(counts: Mapping[_Key, float]) -> dict[_Key, float]:
    """Each count's share, in ascending order for numbers; empty where nothing was counted."""
    total = sum(counts.values())
    keys = sorted(counts) if all(isinstance(key, int) for key in counts) else list(counts)
    return {key: counts[key] / total for key in keys} if total else {}


def _versions(lasts: Sequence[Look]) -> Versions:
    swaps = _count(lasts, "aurora_swaps_total")
    return Versions(
        live=_whole(gauge(lasts, "aurora_drafter_version", max) or None),
        draft_model=_whole(gauge(lasts, "aurora_draft_model_version", max) or None),
        swaps=swaps,
        swap_failures=_count(lasts, "aurora_swap_failures_total"),
        rollbacks=_count(lasts, "aurora_rollbacks_total"),
        last_stall_s=gauge(lasts, "aurora_swap_seconds", max) if swaps else None,
    )


def _training(lasts: Sequence[Look], step: Growth, window: Growth) -> Training:
    alive = bool(gauge(lasts, "aurora_trainer_alive", max))
    return Training(
        alive=alive if alive or _count(lasts, "aurora_traces_total") else None,
        share=gauge(lasts, "aurora_training_share", max) or 0.0,
        drift=bool(gauge(lasts, "aurora_drift", max)),
        traces_per_s=step.rate("aurora_traces_total"),
        traces_waiting=int(gauge(lasts, "aurora_traces_waiting", sum) or 0),
        dropped=_count(lasts, "aurora_traces_dropped_total"),
        unlogged=_count(lasts, "aurora_traces_unlogged_total"),
        staleness=_staleness(window, int(gauge(lasts, "aurora_drafter_version", max) or 0)),
    )


def _staleness(growth: Growth, live: int) -> float | None:
    drafted = {
        int(v): n for v, n in growth.by("aurora_drafted_tokens_total", "version").items() if int(v) > TABLE_VERSION
    }
    total = sum(drafted.values())
    return sum(max(live - v, 0) * n for v, n in drafted.items()) / total if total else None


def _alarms(lasts: Sequence[Look]) -> list[str]:
    """What is wrong, in words, behind the replica's name where there are several."""
    return [
        (f"{look.replica}: " if look.replica else "") + _ALARMS.get(kind, kind)
        for look in lasts
        for labels, on in sorted(look.samples.get("aurora_alarm", {}).items())
        for kind in [dict(labels).get("kind", "?")]
        if on
    ]


def _busy(step: Growth, servers: int) -> float | None:
    rate = step.rate("aurora_busy_seconds_total")
    return None if rate is None else min(rate / servers, 1.0)


def _count(lasts: Sequence[Look], name: str) -> int:
    return int(gauge(lasts, name, sum) or 0)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
