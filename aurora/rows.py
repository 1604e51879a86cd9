"""Rows of the reporter: what is logged under which name. `aurora.panels` says how a workspace shows them.

Names of a group's row come behind the group (`serving/k`), nested ones behind their outer name
(`serving/latency/token_p99`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aurora.metrics import EngineReport, acceptance_length, per_position_acceptance, tokens_per_s
from aurora.trace import TABLE_VERSION

# Group of rows -> its axis. time_s: seconds since the epoch.
AXES = {
    "serving": "time_s",
    "learning": "trainer_step",
    "versions": "drafter_version",
    "draft_model_learning": "draft_model_step",
    "draft_model_versions": "draft_model_version",
}
# Of the table of verified drafts that `reporter.draft_tables` asks for.
DRAFT_COLUMNS = ("version", "domain", "k", "accepted", "rejected", "instead")
_UNLABELLED = "unlabelled"  # requests of which no domain is known
_ODD = re.compile(r"[^\w.:-]+")


def serving_row(latest: EngineReport, total: EngineReport, elapsed_s: float | None) -> dict[str, Any]:
    """Rates of the latest report and running totals, without those that are unknown. Arrays are counts by index.

    elapsed_s: wall-clock seconds that `latest` covers; None if unknown.
    """
    row: dict[str, Any] = {
        "acceptance_length": acceptance_length(latest),
        "acceptance_length_live_version": acceptance_length(latest, latest.drafter_version),
        **{f"acceptance_at_{position}": share for position, share in enumerate(per_position_acceptance(latest))},
        **dict(_by_domain(latest)),
        **dict(_by_source(latest)),
        **dict(_drafter_mix(latest)),
        **{f"latency/{name}": seconds for name, seconds in latest.latency_s.items()},
        "drafter_version": latest.drafter_version,
        "tokens_per_s": None if elapsed_s is None else tokens_per_s(latest, elapsed_s),
        "goodput": tokens_per_s(latest),
        "predicted_goodput": latest.predicted_goodput or None,
        "speedup": latest.plain_s / latest.measured_s if latest.plain_s and latest.measured_s else None,
        "step_time_error": latest.step_error if latest.steps else None,
        "k": np.array(latest.k_histogram) if any(latest.k_histogram) else None,
        **dict(_k_shares(latest)),
        "capture_share": latest.capture_s / latest.busy_s if latest.busy_s else None,
        "swap_s": latest.swap_s if latest.swaps else None,
        "swaps": total.swaps,
        "swap_failures": total.swap_failures,
        "rollbacks": total.rollbacks,
        "requests_refused": total.refused,
        "alarms": len(latest.alarms),
        "traces": total.traces,
        "trace_bytes": total.trace_bytes,
        "traces_dropped": total.traces_dropped,
        "skipped_draft_steps": total.skipped_draft_steps,
        "drift": latest.drift,
        "training_share": latest.training_share,
    }
    return {name: value for name, value in row.items() if value is not None}


def _by_domain(report: EngineReport) -> Iterator[tuple[str, float]]:
    """Share of each domain's drafted tokens that was accepted, whoever drafted."""
    for domain, (drafted, accepted) in report.accepted_by_domain.items():
        if drafted:
            yield f"domain/{metric_name(domain)}/acceptance", accepted / drafted


def _by_source(report: EngineReport) -> Iterator[tuple[str, float]]:
    """Share of the emitted tokens that each source wrote (`aurora.trace.SOURCES`)."""
    tokens = sum(report.tokens_by_source.values())
    for source, count in report.tokens_by_source.items():
        yield f"tokens_from/{source}", count / tokens


def _drafter_mix(report: EngineReport) -> Iterator[tuple[str, float]]:
    """Share of the request steps that each drafter's drafts were verified in; `none`: without drafts."""
    if not report.request_steps:
        return
    steps = {"neural": 0, "table": 0, "model": 0}
    for version, count in report.draft_steps.items():
        steps["table" if version == TABLE_VERSION else "neural" if version > 0 else "model"] += count
    steps["none"] = max(report.request_steps - sum(steps.values()), 0)
    for drafter, count in steps.items():
        yield f"drafter_mix/{drafter}", count / report.request_steps


def _k_shares(report: EngineReport) -> Iterator[tuple[str, float]]:
    """Share of the request steps at each speculation length, and the mean length."""
    steps = sum(report.k_histogram)
    if not steps:
        return
    for k, count in enumerate(report.k_histogram):
        yield f"k_share/{k}", count / steps
    yield "mean_k", sum(k * count for k, count in enumerate(report.k_histogram)) / steps


def metric_name(label: str) -> str:
    """A domain as a part of a metric's name."""
    return _ODD.sub("_", label) or _UNLABELLED


def numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in a tree of mappings and sequences; lists of numbers are told by index."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner = {metric_name(str(key)): item for key, item in value.items()}
            yield from numbers(inner, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            yield from numbers({f"{name}_{i}": item for i, item in enumerate(value)}, prefix)
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)
