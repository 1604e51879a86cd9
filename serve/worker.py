"""What Aurora adds to each vLLM worker process (seam: `--worker-extension-cls`; model runner V1, vLLM 0.32-0.33).

The methods below are called through `collective_rpc`, which vLLM runs between two engine steps.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import torch
import torch.nn.functional as F

from aurora.goodput import TABLE
from aurora.trace import TABLE_VERSION, encode_traces
from serve import sampling_shim, verification
from serve.capture import Capture, TraceSink, Versions
from serve.draft_model import DraftModelHost, StagedModel
from serve.report import StepCounter
from serve.scheduler import NOTES, DraftNotes, StepNotes
from serve.swap import DrafterSwap, Staged

if TYPE_CHECKING:
    from torch import Tensor

_DRAIN_BYTES = 64 << 20
_RUNNER_SEAMS = (
    "sample_tokens",
    "_sample",
    "propose_draft_token_ids",
    "take_draft_token_ids",
    "_get_spec_decode_draft_probs",
)


class AuroraWorker:
    """Mixed into vLLM's worker class; everything is reached through `self.model_runner`."""

    model_runner: Any

    def aurora_install(self, settings: dict[str, Any]) -> dict[str, str]:
        """Put the hooks in place and return what was found. Raises RuntimeError if this runner lacks the seams.

        settings: sink_bytes (0: no capture), prompt_tokens, top_m, codec, store_dir, version, gated_rates, draft_model
        (its store_dir and version, or None).
        """
        runner = self.model_runner
        missing = [name for name in _RUNNER_SEAMS if not hasattr(runner, name)]
        if missing:
            raise RuntimeError(
                f"model runner {type(runner).__name__} lacks {', '.join(missing)}: Aurora needs vLLM 0.32-0.33 with "
                "the V1 runner; set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        sampling_shim.install()
        if runner.device.type == "cpu":
            verification.install()
        drafter = runner.drafter.model
        self._swap = DrafterSwap(drafter, runner.get_model(), Path(settings["store_dir"]), settings["version"])
        self._swap.gated_rates = settings["gated_rates"]
        self._stager = ThreadPoolExecutor(1, "aurora-stage")  # packing a drafter takes longer than a decode step
        self._staged: dict[str, Future[Any]] = {}
        second = settings["draft_model"]
        model = DraftModelHost(runner, Path(second["store_dir"]), second["version"]) if second is not None else None
        self._swaps: dict[str, Any] = {"eagle3": self._swap, "model": model}
        sink = TraceSink(settings["sink_bytes"]) if settings["sink_bytes"] else None
        capture = Capture(runner, sink, settings["prompt_tokens"], settings["top_m"], settings["codec"])
        self._hooks = RunnerHooks(runner, capture, self._swap, model)
        self._hooks.install()
        return {"runner": type(runner).__name__, "drafter": type(drafter).__name__}

    def aurora_drain(self) -> tuple[bytes, bytes]:
        """Traces since the last call (encoded, at most 64 MiB; the rest stays) and an `EngineReport` (msgpack)."""
        sink = self._hooks.capture.sink
        traces = sink.drain(_DRAIN_BYTES) if sink is not None else []
        payload = encode_traces(traces) if traces else b""
        report = self._hooks.counter.take(len(traces), len(payload), sink)
        return payload, msgspec.msgpack.encode(report)

    def aurora_stage(self, number: int, kind: str = "eagle3") -> None:
        """Begin to prepare a published version of a drafter beside serving; ask `aurora_staged` whether it is done."""
        self._staged[kind] = self._stager.submit(_stage, self._swaps[kind], number)

    def aurora_staged(self, kind: str = "eagle3") -> bool:
        """Whether staging is done. Raises what it raised."""
        assert kind in self._staged, "aurora_stage comes first"
        return self._staged[kind].done() and self._staged[kind].result() is not None

    def aurora_commit(self, kind: str = "eagle3") -> float:
        """Exchange the live drafter for the staged one; seconds that the engine stood still."""
        assert kind in self._staged, "aurora_stage comes first"
        staged = self._staged.pop(kind).result()
        started = time.perf_counter()
        self._swaps[kind].commit(staged)
        seconds = time.perf_counter() - started
        self._hooks.counter.swapped(self._swap.version, seconds)
        return seconds

    def aurora_checksums(self) -> tuple[str, str]:
        """(target, live drafter) checksums."""
        return self._swap.target_checksum(), self._swap.drafter_checksum()


@torch.inference_mode()
def _stage(swap: DrafterSwap | DraftModelHost, number: int) -> Staged | StagedModel:
    return swap.stage(number)


class RunnerHooks:
    """Wraps methods of one model runner: capture, drafting or not, q of the drafts, notes for the scheduler."""

    def __init__(self, runner: Any, capture: Capture, swap: DrafterSwap, model: DraftModelHost | None) -> None:
        self.runner = runner
        self.model = model
        self.capture = capture
        self.swap = swap
        self.counter = StepCounter(swap.version)
        self._state: Any = None
        self._notes: StepNotes | None = None  # of the step at hand
        self._one_hot: dict[str, int] = {}
        self._model_drafts: dict[str, list[int]] = {}  # of the step at hand
        self._model_version = model.version if model is not None else 0  # that drafted, or is live
        self._drafted = False
        self._draft_version = swap.version
        self._original = {name: getattr(runner, name) for name in _RUNNER_SEAMS}

    def install(self) -> None:
        self.runner.sample_tokens = self._sample_tokens
        self.runner._sample = self._sample
        self.runner.propose_draft_token_ids = self._propose
        self.runner.take_draft_token_ids = self._take_drafts
        self.runner._get_spec_decode_draft_probs = self._draft_probs

    def _sample_tokens(self, grammar_output: Any) -> Any:
        self._state, self._drafted = self.runner.execute_model_state, False
        self._notes = getattr(self._state.scheduler_output, NOTES, None) if self._state is not None else None
        self._one_hot = self._notes.one_hot if self._notes is not None else {}
        if self._notes is not None:
            self.capture.begin(self._notes.began)
        try:
            with sampling_shim.unseeded(self.runner):
                output = self._original["sample_tokens"](grammar_output)
        finally:
            self._state = None
        self._draft_with_model()
        return output

    def _draft_with_model(self) -> None:
        """Now that the step's tokens are with their requests, let the draft model draft if that was planned."""
        self._model_drafts = {}
        if self.model is None:
            return
        self._model_version = self.model.version
        if self._notes is not None and self._notes.model_cap:
            self._model_drafts = self.model.draft(self._notes.model_for, self._notes.model_cap)

    def _sample(self, logits: "Tensor", spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            # Nothing to verify. Rejection sampling draws the same, but slower, and in vLLM 0.32 it ends the engine when
            # a request has top-k and no top-p.
            spec_decode_metadata = None
        result = self._original["_sample"](logits, spec_decode_metadata)
        if self._state is not None:
            # The drafts just judged were made before any swap since: they belong to `_draft_version`.
            made = {r: TABLE_VERSION if d == TABLE else -self._model_version for r, d in self._one_hot.items()}
            versions = Versions(self._draft_version, made)
            began = time.perf_counter()
            facts = self.capture.record(self._state, result.sampled_token_ids, versions)
            self.counter.step(facts, self._notes, time.perf_counter() - began)
        return result

    def _propose(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._draft_version = self.swap.version
        if self._notes is not None and self._notes.skip_drafter:
            self.runner._draft_probs = None
            return torch.empty(self.runner.input_batch.num_reqs, 0, dtype=torch.int64, device=self.runner.device)
        self._drafted = True
        return self._original["propose_draft_token_ids"](scheduler_output, *args, **kwargs)

    def _draft_probs(self, metadata: Any) -> "Tensor | None":
        """q of the drafts to verify, [drafts, V], or None when all of them were drafted greedily.

        The neural drafter may have sampled its drafts from q; those of the table and of the draft model have all
        probability on one token.
        """
        runner = self.runner
        if runner._draft_probs is None or not self._one_hot:
            return cast("Tensor | None", self._original["_get_spec_decode_draft_probs"](metadata))
        row_of = {r: i for i, r in enumerate(runner._draft_prob_req_ids)}
        ends = np.cumsum(metadata.num_draft_tokens).tolist()
        rows = []
        for request_id, end, k in zip(runner.input_batch.req_ids, ends, metadata.num_draft_tokens, strict=True):
            if request_id in self._one_hot:
                drafts = metadata.draft_token_ids[end - k : end].long()
                rows.append(F.one_hot(drafts, runner._draft_probs.shape[-1]).to(runner._draft_probs.dtype))
            elif k:
                rows.append(runner._draft_probs[row_of[request_id], :k])
        return torch.cat(rows) if rows else None

    def _take_drafts(self) -> Any:
        drafts = self._original["take_draft_token_ids"]()
        if drafts is not None:
            notes = DraftNotes(
                version=self._draft_version,
                gated_rates=self.swap.gated_rates,
                real=self._drafted,
                model=self._model_drafts,
                model_version=self._model_version,
                model_gated_rates=self.model.gated_rates if self.model is not None else [],
            )
            setattr(drafts, NOTES, notes)
        return drafts
