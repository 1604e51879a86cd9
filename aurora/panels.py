"""What people see: the sections and panels of a W&B workspace, each with the names under which the reporter logs.

The one table that the workspace (`aurora.workspace`) and the documentation are made of. Every name in it is one that
`aurora.rows`, the trainer or the gate reports; tests read a run's file back and compare.
"""

from typing import NamedTuple

from aurora.rows import AXES


class Panel(NamedTuple):
    """A plot of lines, or of shares on top of each other, over the axis of its group."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""  # instead of names: a regular expression, where their number is not known before
    unit: str = ""
    stacked: bool = False

    @property
    def axis(self) -> str:
        group = (self.metrics[0] if self.metrics else self.pattern).split("/", 1)[0].lstrip("^")
        return AXES[group]


class Section(NamedTuple):
    name: str
    panels: tuple[Panel, ...]


SERVING = Section(
    "Serving",
    (
        Panel("Tokens a second, by the wall clock", ("serving/tokens_per_s",), unit="tokens/s"),
        Panel("Goodput: predicted and measured", ("serving/goodput", "serving/predicted_goodput"), unit="tokens/s"),
        Panel("Speed-up that the model sees over no speculation", ("serving/speedup",)),
        Panel(
            "Who wrote the tokens", pattern=r"^serving/tokens_from/.*$", unit="share of emitted tokens", stacked=True
        ),
        Panel("Error of the step-time model", ("serving/step_time_error",), unit="share"),
        Panel(
            "Time to the first token",
            tuple(f"serving/latency/first_token_{name}" for name in ("mean", "p50", "p99")),
            unit="s",
        ),
        Panel(
            "Time between tokens", tuple(f"serving/latency/token_{name}" for name in ("mean", "p50", "p99")), unit="s"
        ),
        Panel(
            "Time of a request", tuple(f"serving/latency/request_{name}" for name in ("mean", "p50", "p99")), unit="s"
        ),
        Panel("Speculation length k", pattern=r"^serving/k_share/\d+$", unit="share of request steps", stacked=True),
        Panel("Mean k", ("serving/mean_k",), unit="tokens"),
        Panel(
            "Drafter mix",
            tuple(f"serving/drafter_mix/{name}" for name in ("neural", "table", "model", "none")),
            unit="share of request steps",
            stacked=True,
        ),
        Panel("Requests refused", ("serving/requests_refused",), unit="since the start"),
    ),
)
LEARNING = Section(
    "Learning",
    (
        Panel(
            "Acceptance length, live",
            ("serving/acceptance_length", "serving/acceptance_length_live_version"),
            unit="tokens a verification",
        ),
        Panel(
            "Acceptance length, at the gate",
            ("learning/gate/acceptance_length", "learning/gate/live_acceptance_length"),
            unit="tokens a verification",
        ),
        Panel("Acceptance by position, live", pattern=r"^serving/acceptance_at_\d+$", unit="share of those verified"),
        Panel("Acceptance by depth, training", pattern=r"^learning/acceptance_per_depth_\d+$", unit="share"),
        Panel("Acceptance by domain, live", pattern=r"^serving/domain/.*/acceptance$", unit="share of drafted tokens"),
        Panel("Loss", ("learning/loss", "learning/rl_loss"), unit="nats"),
        Panel("Loss by depth", pattern=r"^learning/loss_per_depth_\d+$", unit="nats"),
        Panel("Gradient norm", ("learning/grad_norm",), unit="before clipping"),
        Panel("Learning rate", ("learning/learning_rate",)),
        Panel("Staleness", ("learning/staleness",), unit="versions"),
        Panel("Replay by domain", pattern=r"^learning/replay_rows/.*$", unit="rows", stacked=True),
        Panel("Replay", ("learning/replay_sequences", "learning/replay_held_out", "learning/replay_evicted")),
        Panel("Drift", ("serving/drift",)),
    ),
)
VERSIONS = Section(
    "Versions",
    (
        Panel("Live version", ("serving/drafter_version",)),
        Panel(
            "Gate of each published version",
            ("versions/acceptance_length", "versions/parent_acceptance_length"),
            unit="tokens a verification",
        ),
        Panel("Parent of each version", ("versions/parent",), unit="version"),
        Panel("Trained on", ("versions/tokens_trained",), unit="rows"),
        Panel("Engine stall of the last swap", ("serving/swap_s",), unit="s"),
        Panel("Swaps, refused and rolled back", ("serving/swaps", "serving/swap_failures", "serving/rollbacks")),
        Panel("Alarms raised", ("serving/alarms",)),
    ),
)
COST = Section(
    "Cost",
    (
        Panel("Share of wall time that the trainer computes", ("serving/training_share",), unit="share"),
        Panel("Share of engine time that capture takes", ("serving/capture_share",), unit="share"),
        Panel("Seconds of an optimiser step", ("learning/seconds",), unit="s"),
        Panel("Traces captured", ("serving/traces",), unit="since the start"),
        Panel("Bytes of traces", ("serving/trace_bytes",), unit="since the start"),
        Panel("Traces and rows lost", ("serving/traces_dropped", "serving/rows_dropped"), unit="since the start"),
        Panel("Steps in which the drafter did not run", ("serving/skipped_draft_steps",), unit="since the start"),
    ),
)
SECTIONS = (SERVING, LEARNING, VERSIONS, COST)
