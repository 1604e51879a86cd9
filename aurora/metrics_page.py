"""docs/metrics.md: every metric on `/metrics` that is Aurora's, those of vLLM's that matter here, Grafana's panels."""

from collections.abc import Iterator
from itertools import chain

from aurora import grafana
from aurora.metrics import METRICS

# vLLM's own, as they stand on /metrics -> what they say here.
VLLM = {
    "vllm:num_requests_running": "requests in the running batch",
    "vllm:num_requests_waiting": "requests that wait for a place in it",
    "vllm:kv_cache_usage_perc": "share of the KV cache in use, 0 to 1; preemptions begin near 1",
    "vllm:num_preemptions_total": "requests sent back to wait because the KV cache was full",
    "vllm:prompt_tokens_total": "prompt tokens taken in",
    "vllm:generation_tokens_total": "tokens given out; its rate is the throughput that users see",
    "vllm:prefix_cache_queries_total": "prompt tokens looked up in the prefix cache",
    "vllm:prefix_cache_hits_total": "of them, found there",
    "vllm:time_to_first_token_seconds": "histogram, waiting included",
    "vllm:inter_token_latency_seconds": "histogram of the time between two outputs of a request; speculation lowers it",
    "vllm:e2e_request_latency_seconds": "histogram of whole requests",
    "vllm:request_queue_time_seconds": "histogram of the time before a request's first step",
    "vllm:request_success_total": "requests that ended, by `finished_reason`",
    "vllm:spec_decode_num_drafts_total": "verifications with drafts, all drafters together",
    "vllm:spec_decode_num_draft_tokens_total": "drafted tokens verified",
    "vllm:spec_decode_num_accepted_tokens_total": "of them, accepted; 1 + this / drafts is the acceptance length",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": "accepted by `position`",
}
_HEAD = """\
# Metrics

Made by `aurora dashboard metrics`; a test compares. All of it is on the server's `/metrics`, in Prometheus' text form,
behind an API key where the server has one. What each process reports to W&B, TensorBoard or a file, and how to run
Prometheus and Grafana: [dashboards](dashboards.md).

## Aurora's

`version` is a drafter version: above 0 the neural drafter's, 0 the n-gram table, below 0 the draft model's. Series of
the versions that drafted longest ago leave the page. A server without speculation has none of these.

| metric | kind | labels | what it says |
|---|---|---|---|
"""
_VLLM = """
## vLLM's that matter

The others stand in vLLM's documentation. All have the labels `model_name` and `engine`. The times to the first token,
between tokens and of whole requests come from here into the reporter's rows, too.

| metric | what it says |
|---|---|
"""
_GRAFANA = """
## Panels of the Grafana dashboard

| row | panel | shows | unit | expressions |
|---|---|---|---|---|
"""
_FOOT = """
`$instance` are the servers chosen at the top of the dashboard, `$__rate_interval` is Grafana's.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [_HEAD], _metrics(), [_VLLM], _vllm(), [_GRAFANA], _panels(), [_FOOT]
    return "".join(chain.from_iterable(parts))


def _metrics() -> Iterator[str]:
    for name, metric in METRICS.items():
        yield f"| `{name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |\n"


def _vllm() -> Iterator[str]:
    for name, meaning in VLLM.items():
        yield f"| `{name}` | {meaning} |\n"


def _panels() -> Iterator[str]:
    for row in grafana.ROWS:
        for panel in row.panels:
            expressions = "<br>".join(f"`{_cell(expression)}`" for expression in panel.targets.values())
            yield f"| {row.title} | {panel.title} | {panel.text} | {panel.unit} | {expressions} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
