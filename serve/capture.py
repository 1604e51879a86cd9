"""Turns engine steps into `DraftTrace`s, inside the vLLM worker (seam: model runner V1, `sample_tokens` and `_sample`).

`Capture.record` runs once a step between sampling and drafting. Rows are copied as bf16 and encoded (`aurora.codec`) in
one piece a step, so that the sink's bound counts what travels; packing waits until the traces are collected. The sink
drops its oldest traces when full; the engine never waits.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from aurora.codec import CODECS
from aurora.trace import DraftTrace, carried

if TYPE_CHECKING:
    from torch import Tensor


class TraceSink:
    """A queue of traces bounded in bytes: full, it drops the oldest and counts."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.dropped = 0
        self._traces: deque[DraftTrace] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._traces)

    def put(self, trace: DraftTrace) -> None:
        self._traces.append(trace)
        self._bytes += trace.nbytes
        while self._bytes > self.limit_bytes:
            self._bytes -= self._traces.popleft().nbytes
            self.dropped += 1

    def drain(self, limit_bytes: int) -> list[DraftTrace]:
        """The oldest traces up to `limit_bytes`, at least one if there is any."""
        taken: list[DraftTrace] = []
        size = 0
        while self._traces and (not taken or size + self._traces[0].nbytes <= limit_bytes):
            taken.append(self._traces.popleft())
            size += taken[-1].nbytes
        self._bytes -= size
        return taken


class StepFact(NamedTuple):
    """What one request did in one engine step."""

    rows: int  # tokens that the target read
    k: int  # drafts among them
    emitted: int  # tokens that came of it; 0 in the middle of a prompt
    version: int  # drafter version that made the drafts
    domain: str = ""


class _Kept(NamedTuple):
    """Rows of one request in a step's batch."""

    request: int
    first: int
    end: int
    position: int  # of the first row in the request's sequence


_Span = tuple[int, int]  # first row, one past the last


@dataclass(frozen=True)
class Versions:
    """Who made the drafts of a step: `others` those of some requests, one neural drafter version all the rest."""

    neural: int
    others: Mapping[str, int]  # request -> version as `aurora.trace` counts them

    def of(self, request_id: str) -> int:
        return self.others.get(request_id, self.neural)


def bf16_bits(rows: "Tensor") -> np.ndarray:
    """[n, d] of any float type -> uint16 bit patterns of bfloat16 on the host."""
    bits: np.ndarray = rows.to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy()
    return bits


class Capture:
    """Reads the model runner's state after each step."""

    def __init__(self, runner: Any, sink: TraceSink | None, prompt_tokens: int, top_m: int, codec: str) -> None:
        """codec: a name in `aurora.codec.CODECS`."""
        self.runner = runner
        self.sink = sink
        self.codec = codec
        self.prompt_tokens = prompt_tokens
        self.top_m = top_m
        self._step = 0
        self._domains: dict[str, str] = {}

    def begin(self, domains: Mapping[str, str]) -> None:
        """The domains of requests that are new; those that the runner no longer knows are forgotten."""
        if domains:
            self._domains = {r: d for r, d in self._domains.items() if r in self.runner.requests} | dict(domains)

    def record(self, state: Any, sampled: "Tensor", versions: Versions) -> list[StepFact]:
        """Make this step's traces; returns what each request did, in batch order.

        state: the runner's ExecuteModelState; sampled: [B, <= k_max + 1] int, -1 past what was accepted; versions:
        who made the drafts that this step verified.
        """
        self._step += 1
        batch = self.runner.input_batch
        output = state.scheduler_output
        drafts = state.spec_decode_metadata.num_draft_tokens if state.spec_decode_metadata else [0] * batch.num_reqs
        emitted = (sampled >= 0).sum(dim=1).tolist() if sampled.dim() == 2 else [1] * batch.num_reqs
        rows = [output.num_scheduled_tokens[r] for r in batch.req_ids]
        facts = []
        for i, (n, k) in enumerate(zip(rows, drafts, strict=True)):
            start = int(batch.num_computed_tokens_cpu[i])
            mid_prefill = start + n - k < int(batch.num_tokens_no_spec[i])
            request_id, got = batch.req_ids[i], 0 if mid_prefill else int(emitted[i])
            facts.append(StepFact(n, k, got, versions.of(request_id), self._domains.get(request_id, "")))
        if self.sink is not None and state.aux_hidden_states is not None:
            self._emit(state, sampled.tolist(), facts, self.sink)
        return facts

    def _emit(self, state: Any, sampled: list[list[int]], facts: list[StepFact], sink: TraceSink) -> None:
        batch = self.runner.input_batch
        keep = self._kept_rows(facts)
        if not keep:
            return
        hidden, aux = self._states(state, keep, facts)
        ids = self.runner.input_ids.cpu[: keep[-1].end].numpy().astype(np.int32)
        q, now = self._draft_q(state.spec_decode_metadata), time.time()
        for (i, first, end, position), last_state, taps in zip(keep, hidden, aux, strict=True):
            _, k, emitted, version, domain = facts[i]
            sink.put(
                DraftTrace(
                    request_id=batch.req_ids[i],
                    step=self._step,
                    time_s=now,
                    position=position,
                    prompt_tokens=int(batch.num_prompt_tokens[i]),
                    input_ids=ids[first:end].copy(),
                    emitted_ids=np.array(sampled[i][:emitted], dtype=np.int32),
                    k=k,
                    accepted=max(emitted - 1, 0),
                    draft_q=q[i][0] if q else np.ones(k, np.float32),
                    top_q_ids=q[i][1] if q else np.zeros((k, 0), np.int32),
                    top_q=q[i][2] if q else np.zeros((k, 0), np.float32),
                    codec=self.codec,
                    hidden=last_state,
                    aux=taps,
                    drafter_version=version,
                    temperature=float(batch.temperature_cpu[i]),
                    top_p=float(batch.top_p_cpu[i]),
                    top_k=_top_k(int(batch.top_k_cpu[i]), batch.vocab_size),
                    domain=domain,
                )
            )

    def _states(
        self, state: Any, keep: list[_Kept], facts: list[StepFact]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The last hidden and the tapped states of each trace, encoded together."""
        codec, prompts = CODECS[self.codec], self.runner.input_batch.num_prompt_tokens
        last_rows, tap_rows = [], []
        for i, first, end, position in keep:
            rejected = facts[i].k - max(facts[i].emitted - 1, 0)
            head, tail = carried(codec, end - first, position, int(prompts[i]), rejected)
            last_rows.append((first + head, end))
            tap_rows.append((first, first + tail))
        hidden = codec.hidden.encode(bf16_bits(_rows(state.hidden_states, last_rows)))
        aux = bf16_bits(torch.cat([_rows(tap, tap_rows) for tap in state.aux_hidden_states], dim=-1))
        return _cut(hidden, last_rows), _cut(codec.encode_aux(aux), tap_rows)

    def _kept_rows(self, facts: list[StepFact]) -> list[_Kept]:
        """What becomes a trace: all rows but prompt rows that are too old."""
        batch = self.runner.input_batch
        keep, offset = [], 0
        for i, fact in enumerate(facts):
            n, start = fact.rows, int(batch.num_computed_tokens_cpu[i])
            oldest = int(batch.num_prompt_tokens[i]) - self.prompt_tokens
            skip = min(max(oldest - start, 0), n)
            if skip < n:
                keep.append(_Kept(i, offset + skip, offset + n, start + skip))
            offset += n
        return keep

    def _draft_q(self, metadata: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None:
        """Per request: q of each draft [k], the drafter's top-m ids and q [k, m]; None for greedy drafts."""
        probs = self.runner._get_spec_decode_draft_probs(metadata) if metadata is not None else None
        if probs is None:
            return None
        top = probs.topk(self.top_m, dim=-1)
        q = probs.gather(1, metadata.draft_token_ids.long().unsqueeze(1)).squeeze(1).float().cpu().numpy()
        ids, values = top.indices.int().cpu().numpy(), top.values.float().cpu().numpy()
        ends = np.cumsum(metadata.num_draft_tokens)
        return [
            (q[e - k : e], ids[e - k : e], values[e - k : e])
            for e, k in zip(ends, metadata.num_draft_tokens, strict=True)
        ]


def _rows(tensor: "Tensor", spans: list[_Span]) -> "Tensor":
    if all(a[1] == b[0] for a, b in pairwise(spans)):
        return tensor[spans[0][0] : spans[-1][1]]
    return tensor[torch.cat([torch.arange(first, end) for first, end in spans]).to(tensor.device)]


def _cut(rows: np.ndarray, spans: list[_Span]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum([end - first for first, end in spans])[:-1])


def _top_k(value: int, vocab_size: int) -> int:
    return 0 if value >= vocab_size else value
