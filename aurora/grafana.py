"""Grafana's dashboard: rows of panels over what `/metrics` says, as the JSON that Grafana reads.

`aurora/deploy/grafana/aurora.json` is what `aurora dashboard grafana` prints. Of vLLM's own metrics those are used that
say how requests fare; everything about drafts is Aurora's, which counts by drafter version.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 8
_HERE = '{instance=~"$instance"}'


class Panel(NamedTuple):
    """One plot: expressions by their legends (`{{label}}` is filled in by Grafana)."""

    title: str
    unit: str  # Grafana's name of it
    targets: dict[str, str]
    text: str  # what it shows
    stacked: bool = False
    kind: str = "timeseries"


class Row(NamedTuple):
    title: str
    panels: tuple[Panel, ...]


def _rate(metric: str, by: str = "", matchers: str = "") -> str:
    """Sum over series of a counter's rate."""
    where = f'{{instance=~"$instance"{matchers and ", " + matchers}}}'
    return f"sum{by and f' by ({by}) '}(rate({metric}{where}[$__rate_interval]))"


def _quantiles(histogram: str) -> dict[str, str]:
    buckets = _rate(f"{histogram}_bucket", "le")
    return {f"p{share * 100:g}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.95, 0.99)}


def _of_steps(matcher: str) -> str:
    return f"({_rate('aurora_draft_steps_total', matchers=matcher)}) / {_rate('aurora_request_steps_total')}"


SERVING = Row(
    "Serving",
    (
        Panel(
            "Tokens",
            "short",
            {"generated": _rate("vllm:generation_tokens_total"), "prompt": _rate("vllm:prompt_tokens_total")},
            "A second, by the wall clock.",
        ),
        Panel(
            "Goodput: predicted and measured",
            "short",
            {
                "measured {{instance}} {{replica}}": f"aurora_goodput_tokens_per_s{_HERE}",
                "predicted {{instance}} {{replica}}": f"aurora_predicted_goodput_tokens_per_s{_HERE}",
            },
            "Emitted tokens a second of engine time.",
        ),
        Panel(
            "Step time: predicted over measured",
            "percentunit",
            {
                "predicted / measured": f"{_rate('aurora_predicted_seconds_total')} / "
                f"{_rate('aurora_measured_seconds_total')}",
                "median error {{instance}} {{replica}}": f"aurora_step_time_error{_HERE}",
            },
            "1: the step-time model is right on average. Its median error is of single steps.",
        ),
        Panel(
            "Speed-up over no speculation",
            "none",
            {"speed-up": f"{_rate('aurora_plain_seconds_total')} / {_rate('aurora_measured_seconds_total')}"},
            "What the step-time model predicts for the same tokens without drafts, over what the steps took.",
        ),
        Panel(
            "Time to the first token",
            "s",
            _quantiles("vllm:time_to_first_token_seconds"),
            "From a request's arrival, waiting included.",
        ),
        Panel(
            "Time between tokens",
            "s",
            _quantiles("vllm:inter_token_latency_seconds"),
            "Between two outputs of a request; one output may have several tokens.",
        ),
        Panel(
            "Time of a request",
            "s",
            _quantiles("vllm:e2e_request_latency_seconds"),
            "From its arrival to its last token.",
        ),
        Panel(
            "Requests",
            "short",
            {
                "running": f"sum(vllm:num_requests_running{_HERE})",
                "waiting": f"sum(vllm:num_requests_waiting{_HERE})",
            },
            "In the running batch, and waiting for a place in it.",
        ),
        Panel(
            "Speculation length k",
            "percentunit",
            {"k = {{k}}": f"{_rate('aurora_k_total', 'k')} / ignoring(k) group_left () {_rate('aurora_k_total')}"},
            "Share of the request steps.",
            stacked=True,
        ),
        Panel(
            "Drafter mix",
            "percentunit",
            {
                "neural": _of_steps('version=~"[1-9].*"'),
                "table": _of_steps('version="0"'),
                "draft model": _of_steps('version=~"-.*"'),
            },
            "Share of the request steps in which each drafter's drafts were verified.",
            stacked=True,
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            {"{{instance}} {{replica}}": f"vllm:kv_cache_usage_perc{_HERE}"},
            "Near 100 % requests are sent back to wait (Preemptions).",
        ),
        Panel(
            "Prompt tokens found in the cache",
            "percentunit",
            {"hits": f"{_rate('vllm:prefix_cache_hits_total')} / {_rate('vllm:prefix_cache_queries_total')}"},
            "Of those looked up: not computed again.",
        ),
        Panel(
            "Parts of a step",
            "s",
            {"{{part}}": f"avg by (part) (aurora_step_cost_seconds{_HERE})"},
            "As last fitted by the step-time model.",
        ),
    ),
)
LEARNING = Row(
    "Learning",
    (
        Panel(
            "Acceptance length",
            "short",
            {
                "all drafters": f"1 + {_rate('aurora_accepted_tokens_total')} / {_rate('aurora_draft_steps_total')}",
                "version {{version}}": f"1 + {_rate('aurora_accepted_tokens_total', 'version')} / "
                f"{_rate('aurora_draft_steps_total', 'version')}",
            },
            "Tokens emitted by a verification that has drafts. 0: the table; below 0: the draft model.",
        ),
        Panel(
            "Acceptance by position",
            "percentunit",
            {
                "position {{position}}": f"{_rate('aurora_accepted_at_total', 'position')} / "
                f"{_rate('aurora_verified_at_total', 'position')}"
            },
            "Share of the drafts verified there.",
        ),
        Panel(
            "Acceptance as vLLM counts it",
            "short",
            {
                "length": f"1 + {_rate('vllm:spec_decode_num_accepted_tokens_total')} / "
                f"{_rate('vllm:spec_decode_num_drafts_total')}"
            },
            "All drafters together; to compare with the panel Acceptance length.",
        ),
        Panel(
            "Live version",
            "none",
            {
                "neural drafter {{instance}} {{replica}}": f"aurora_drafter_version{_HERE}",
                "draft model {{instance}} {{replica}}": f"aurora_draft_model_version{_HERE}",
            },
            "That the engine drafts with. Replicas may differ for a while: one tries a new version first.",
        ),
        Panel(
            "Drafted tokens",
            "short",
            {"drafted": _rate("aurora_drafted_tokens_total"), "accepted": _rate("aurora_accepted_tokens_total")},
            "A second, verified, and those that the target took.",
        ),
        Panel(
            "What training takes",
            "percentunit",
            {
                "of wall time, trainer {{instance}} {{replica}}": f"aurora_training_share{_HERE}",
                "of engine time, capture": f"{_rate('aurora_capture_seconds_total')} / "
                f"{_rate('aurora_busy_seconds_total')}",
            },
            "Share of wall time that the trainer computes, and of engine time that recording traces takes.",
        ),
        Panel(
            "Traces",
            "short",
            {"captured": _rate("aurora_traces_total"), "waiting": f"sum(aurora_traces_waiting{_HERE})"},
            "Captured a second, and those that wait for the trainer.",
        ),
        Panel(
            "Traces, bytes", "Bps", {"captured": _rate("aurora_trace_bytes_total")}, "From the engine to the trainer."
        ),
        Panel(
            "Drift",
            "none",
            {"{{instance}} {{replica}}": f"aurora_drift{_HERE}"},
            "1 while the newest traffic drafts worse.",
        ),
    ),
)
SAFETY = Row(
    "Safety",
    (
        Panel(
            "Alerts that fire",
            "none",
            {"{{alertname}} {{instance}} {{replica}}": 'ALERTS{job="aurora", alertstate="firing"}'},
            "Rules of aurora/deploy/prometheus/alerts.yml; what to do is in docs/runbook.md.",
        ),
        Panel(
            "Alarms",
            "none",
            {"{{kind}} {{instance}} {{replica}}": f"aurora_alarm{_HERE}"},
            "1: wrong and not right by itself.",
        ),
        Panel(
            "Up",
            "none",
            {
                "endpoint {{instance}} {{replica}}": f"up{_HERE}",
                "trainer {{instance}} {{replica}}": f"aurora_trainer_alive{_HERE}",
            },
            "1: Prometheus reads the server's page, and the trainer answers the server.",
        ),
        Panel(
            "Answers by status",
            "reqps",
            {"{{code}}": _rate("aurora_responses_total", "code")},
            "HTTP status codes of all answers.",
        ),
        Panel(
            "Requests refused",
            "reqps",
            {"503": _rate("aurora_requests_refused_total")},
            "More came than limits.waiting lets wait: status 503.",
        ),
        Panel(
            "Replicas",
            "none",
            {
                "{{replica}} up": f"aurora_router_replica_up{_HERE}",
                "{{replica}} open requests": f"aurora_router_open_requests{_HERE}",
            },
            "Of several behind one endpoint.",
        ),
        Panel(
            "Requests by outcome",
            "reqps",
            {"{{outcome}}": _rate("aurora_router_requests_total", "outcome")},
            "Of a router: answered; handed on, since a replica took nothing; broken, since one ended.",
        ),
        Panel(
            "Preemptions",
            "short",
            {"preempted": _rate("vllm:num_preemptions_total")},
            "Requests a second that were sent back to wait because the KV cache was full.",
        ),
        Panel(
            "Versions",
            "short",
            {
                "swapped in": f"sum(increase(aurora_swaps_total{_HERE}[1h]))",
                "refused": f"sum(increase(aurora_swap_failures_total{_HERE}[1h]))",
                "rolled back": f"sum(increase(aurora_rollbacks_total{_HERE}[1h]))",
            },
            "In the last hour.",
        ),
        Panel(
            "Engine stall of the last swap",
            "s",
            {"{{instance}} {{replica}}": f"aurora_swap_seconds{_HERE}"},
            "That requests waited while the newest version was put in.",
        ),
        Panel(
            "Lost",
            "short",
            {
                "traces dropped": _rate("aurora_traces_dropped_total"),
                "traces not logged": _rate("aurora_traces_unlogged_total"),
                "rows not reported": _rate("aurora_report_rows_dropped_total"),
            },
            "A second. Serving goes on without them.",
        ),
    ),
)
ROWS = (SERVING, LEARNING, SAFETY)


def as_json() -> str:
    """The dashboard as a file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "aurora",
        "title": "Aurora",
        "tags": ["aurora"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource_variable(), _instance_variable()]},
        "panels": list(_placed()),
    }


def _placed() -> Iterator[dict[str, Any]]:
    """Rows below each other, the panels of each three abreast."""
    number, y = 0, 0
    for row in ROWS:
        number += 1
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        y += 1
        for i, panel in enumerate(row.panels):
            number += 1
            across, down = i % (_COLUMNS // _WIDTH), i // (_COLUMNS // _WIDTH)
            place = {"x": across * _WIDTH, "y": y + down * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield {"id": number, "gridPos": place, **_drawn(panel)}
        y += -(-len(row.panels) // (_COLUMNS // _WIDTH)) * _HEIGHT


def _drawn(panel: Panel) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom = {"fillOpacity": 30 if panel.stacked else 0, "stacking": stacking, "showPoints": "never"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _DATASOURCE, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(panel.targets.items())
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _instance_variable() -> dict[str, Any]:
    query = "label_values(aurora_drafter_version, instance)"
    return {
        "name": "instance",
        "type": "query",
        "label": "Server",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": "instance"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }
