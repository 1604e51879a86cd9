"""What traces and training need as replicas grow in number, and what share of the requests can be learned from.

A replica that emits tokens also writes rows: one for each prompt token that is kept, and one for each token that its
target computes, rejected drafts included. They leave the worker encoded, cross a link, are decoded and joined by the
trainer, and those that were emitted are trained on. Each of these has a speed; when whole requests are sampled at rate
s, each takes s of what it otherwise would. All of it is arithmetic on numbers measured on one host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aurora.codec import TAPS, TraceCodec
from aurora.trace import DraftTrace, encode_traces


@dataclass(frozen=True)
class Traffic:
    """What a replica does in a second."""

    tokens_per_s: float  # emitted
    requests_per_s: float
    prompt_rows: float  # of a request, that are kept: at most `capture.prompt_tokens`
    drafted_per_token: float  # drafts that were verified, for each token emitted
    accepted_per_token: float

    @property
    def emitted_rows(self) -> float:
        """Rows that training uses, a second."""
        return self.tokens_per_s

    @property
    def rejected_rows(self) -> float:
        return self.tokens_per_s * (self.drafted_per_token - self.accepted_per_token)

    @property
    def kept_prompt_rows(self) -> float:
        return self.requests_per_s * self.prompt_rows

    @property
    def rows(self) -> float:
        return self.emitted_rows + self.rejected_rows + self.kept_prompt_rows

    @property
    def traces(self) -> float:
        """One for each step of a request: it emits what was accepted and one token more."""
        return self.tokens_per_s * (1 - self.accepted_per_token)

    def bytes_per_s(self, codec: TraceCodec, hidden_size: int) -> float:
        """Prompt rows hold the tapped states, rejected rows the last hidden state, the others both."""
        hidden, tapped = codec.hidden.row_bytes(hidden_size), TAPS * codec.aux.row_bytes(hidden_size)
        beside = self.traces * bytes_beside_states(0) + self.rows * (bytes_beside_states(1) - bytes_beside_states(0))
        if codec.whole:
            return beside + self.rows * (hidden + tapped)
        with_hidden, with_tapped = self.emitted_rows + self.rejected_rows, self.emitted_rows + self.kept_prompt_rows
        return beside + with_hidden * hidden + with_tapped * tapped


@lru_cache
def bytes_beside_states(drafts: int) -> int:
    """Of a trace of one step with so many drafts, all accepted, as it is encoded."""
    numbers, floats = np.zeros(drafts + 1, np.int32), np.zeros(drafts, np.float32)
    none, states = np.zeros((drafts, 0)), np.zeros((drafts + 1, 0), np.uint8)
    trace = DraftTrace(
        request_id="chatcmpl-" + "0" * 32,
        step=1 << 20,
        time_s=1e9,
        position=1 << 10,
        prompt_tokens=1 << 10,
        input_ids=numbers,
        emitted_ids=numbers,
        k=drafts,
        accepted=drafts,
        draft_q=floats,
        top_q_ids=none.astype(np.int32),
        top_q=none.astype(np.float32),
        codec="compact",
        hidden=states,
        aux=states,
        drafter_version=1 << 10,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        domain="",
    )
    return len(encode_traces([trace]))


@dataclass(frozen=True)
class Speeds:
    """What one core or link does."""

    encode_rows_per_s: float  # of a core of a replica
    decode_rows_per_s: float  # of the trainer's core
    train_rows_per_s: float  # of the trainer
    link_bytes_per_s: float  # into the trainer's node


@dataclass(frozen=True)
class Shares:
    """The most that learning may take of each, 0 to 1."""

    encode: float = 0.05
    decode: float = 0.2
    train: float = 1.0
    link: float = 0.1


@dataclass(frozen=True)
class Budget:
    """One number of replicas with one trainer."""

    replicas: int
    rows_per_s: float
    bytes_per_s: float
    loads: Mapping[str, float]  # share of each resource that tracing every request would take
    rates: Mapping[str, float]  # share of the requests that keeps each within its share, at most 1

    @property
    def first(self) -> str:
        """What saturates first."""
        return min(self.rates, key=lambda name: (self.rates[name], -self.loads[name]))

    @property
    def rate(self) -> float:
        """Share of the requests that keeps everything within its share."""
        return self.rates[self.first]


def budget(replicas: int, traffic: Traffic, row_bytes_per_s: float, speeds: Speeds, shares: Shares) -> Budget:
    """row_bytes_per_s: `Traffic.bytes_per_s`, of one replica."""
    loads = {
        "encode": traffic.rows / speeds.encode_rows_per_s,  # each replica has a core of its own for it
        "link": replicas * row_bytes_per_s / speeds.link_bytes_per_s,
        "decode": replicas * traffic.rows / speeds.decode_rows_per_s,
        "train": replicas * traffic.emitted_rows / speeds.train_rows_per_s,
    }
    rates = {name: min(getattr(shares, name) / load, 1.0) if load else 1.0 for name, load in loads.items()}
    return Budget(replicas, replicas * traffic.rows, replicas * row_bytes_per_s, loads, rates)


def train_rows_per_s(parameters: int, depth: int, flops_per_s: float) -> float:
    """Rollout starts a second: each of `depth` nodes takes six operations a trained parameter."""
    return flops_per_s / (6 * parameters * depth)
