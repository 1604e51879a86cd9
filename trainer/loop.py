"""The training loop: what the trainer does next, one unit of work at a time.

It consumes trace payloads (`ingest`, from any thread) and produces drafter versions. A unit is an optimiser step; or,
when an interval has passed and there were steps since, the gate with publication, or a checkpoint. With nothing to
train on it waits for a payload. `ingest` never waits for a unit: traces go to a bounded replay, the oldest leave first.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from aurora.config import AuroraConfig
from aurora.store import DrafterStore, DrafterVersion
from aurora.trace import decode_traces, unpack_states
from drafters import TargetWeights, ensure_drafter, load_drafter, save_drafter
from drafters.vocab import rechoose
from trainer.budget import Budget, Load
from trainer.buffer import Replay, staleness
from trainer.checkpoint import SAVE_ERRORS, CheckpointRefused, load_checkpoint, save_checkpoint
from trainer.crew import Crew, Helper
from trainer.draft_model import DraftModelTraining
from trainer.flops import Speed, measure_peak, step_flops
from trainer.gate import Verdict, judge
from trainer.learner import Learner, StepMetrics, uses_bf16
from trainer.rollout import Batch, build_batch
from trainer.samples import DraftSamples, text_decoder
from trainer.shares import Windows
from trainer.sinks import Sinks

log = logging.getLogger(__name__)

_TRAINING_PER_GATE = 4.0  # seconds of training that a second of judging must follow: a slow trainer learns, too
MAX_PASSES = 50  # over the rows received: beyond it training waits for fresh traffic instead of learning it by heart


class TrainerLoop:
    """Everything that trains the drafters. One thread calls `run` (or `work`); any thread may call the rest."""

    def __init__(
        self,
        config: AuroraConfig,
        target_dir: Path,
        sinks: Sinks | None = None,
        clock: Callable[[], float] = time.monotonic,
        device: str = "cpu",
        *,
        model_sinks: Sinks | None = None,
        helpers: Sequence[Helper] = (),
        address: str = "127.0.0.1",
    ) -> None:
        """Resume from the checkpoint in `config.run_dir`, else from the newest version, else from the target.

        helpers: workers to share the neural drafter's steps with; they meet at `address`, which is this machine's.
        Raises DrafterRefused or ValueError when what is there does not belong to the target.
        """
        self.config = config
        self._settings = config.trainer
        self._sinks = sinks or Sinks()
        self._clock = clock
        self._device = device
        self._target = TargetWeights.load(target_dir, device)
        self._store = DrafterStore(config.store_dir)
        self.version = ensure_drafter(self._store, target_dir, config.speculation, self._settings.seed).number
        self.live = load_drafter(self._store.read(self.version).path, self._target)
        self._learner = Learner(
            load_drafter(self._store.read(self.version).path, self._target),
            self._target,
            self._settings,
        )
        sizes = self.live.config
        self._replay = Replay(sizes.hidden_size, sizes.vocab_size, self._settings.replay_mib, self._settings.holdout)
        self._samples: DraftSamples | None = None
        if config.reporter.draft_tables:
            self._samples = DraftSamples(text_decoder(target_dir), self._settings.seed)
        self._resume()
        self.crew = Crew(self._learner, helpers, address, device, self._settings.worker_timeout_s) if helpers else None
        self._peak = measure_peak(uses_bf16(self._settings.precision, device), device)  # operations per second
        self._speed = Speed()
        self._budget = Budget(self._settings, clock())
        self._changed = threading.Condition()  # guards the replay, the budget and the flags below
        drafters = config.speculation.drafters
        self._model_share = self._settings.draft_model_share if "eagle3" in drafters else 1.0
        self.draft_model: DraftModelTraining | None = None  # trained beside the neural drafter
        if "model" in drafters:
            self.draft_model = DraftModelTraining(
                config,
                self._target,
                self._replay,
                self._changed,
                sinks=model_sinks or Sinks(),
                clock=clock,
                device=device,
            )
        self._spent_s = 0.0  # by the neural drafter's units of work
        self._stopped = False
        self._allowed = self._learner.tokens  # rows that may be trained on in all
        self._allowed_before = self._allowed
        self._gated_step = self._saved_step = self._learner.steps
        self._gated_at = self._saved_at = clock()
        self._trained_s = self._gate_s = 0.0  # since the last gate; of the last gate
        self.gated_rates: list[float] = []  # conditional acceptance per position of the live version, as gated
        self.last_step: StepMetrics | None = None
        self.last_verdict: Verdict | None = None
        self.unsaved = ""  # why the disk did not take what was written last

    @property
    def live_directory(self) -> Path:
        """Where the newest published version lies."""
        return self._store.read(self.version).path

    @property
    def _checkpoints(self) -> Path:
        return self.config.run_dir / "trainer"

    def _resume(self) -> None:
        try:
            counts = load_checkpoint(self._checkpoints, self._learner)
        except CheckpointRefused as error:
            log.warning("%s; training goes on from drafter version %d", error, self.version)
            return
        if counts is not None:
            self._replay.emitted_counts += counts
            log.info("resumed at step %d", self._learner.steps)

    def ingest(self, payload: bytes) -> int:
        """Take the traces of one payload; returns their number. Raises ValueError for a damaged payload."""
        traces = list(unpack_states(decode_traces(payload), self._replay.hidden_size))
        with self._changed:
            before = self._replay.received
            for trace in traces:
                self._replay.add(trace)
            if self._samples is not None:
                self._samples.add(traces)
            self._allowed += MAX_PASSES * (self._replay.received - before)
            self._changed.notify_all()
        return len(traces)

    def stop(self) -> None:
        """Let `run` return after the unit it is in."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def run(self) -> None:
        """Work until stopped, within the budget; leaves a checkpoint behind. A disk that takes none costs just that."""
        while self._wait_for_work():
            with self._changed:
                self._budget.begin(self._clock())
            self.work()
            with self._changed:
                self._budget.end(self._clock())
            self._rest()
        self._write(self.checkpoint)
        self.close()

    def close(self) -> None:
        """End the other workers."""
        if self.crew is not None:
            self.crew.close()

    def _write(self, save: Callable[[], object]) -> None:
        try:
            save()
        except SAVE_ERRORS as error:
            self.unsaved = " ".join(str(error).split())
            log.error("not saved, another try follows: %s", self.unsaved)

    def hear(self, load: Load) -> float:
        """The server says how it is; returns the share of wall time that was spent computing of late."""
        with self._changed:
            now_s = self._clock()
            raised = self._budget.raised(now_s)
            self._budget.hear(load, now_s)
            if self._budget.raised(now_s) and not raised:
                log.info("drift: up to %.2f of the time is spent training", self._settings.drift_duty)
            self._changed.notify_all()
            return self._budget.computed_share(now_s)

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when stopped. A gate falls due though no trace comes."""
        with self._changed:
            while not (self._stopped or self._can_train or self._due_publication or self._draft_model_can_work):
                self._changed.wait(self._until_publication())
            return not self._stopped

    def _until_publication(self) -> float | None:
        """Seconds until a gate is due, None when there is nothing new to judge."""
        if self._learner.steps == self._gated_step:
            return None
        return max(0.0, self._gated_at + self._settings.publish_interval_s - self._clock())

    def _rest(self) -> None:
        """Stay idle for as long as the budget asks; news from the server may change that."""
        with self._changed:
            while not self._stopped and (rest_s := self._budget.rest_s(self._clock())) > 0:
                self._changed.wait(rest_s)

    def work(self) -> bool:
        """One unit: publish or checkpoint if due, else one optimiser step; False when there is nothing to do."""
        if self._is_draft_models_turn:
            assert self.draft_model is not None
            self._write(partial(self.draft_model.work, self._earned))
            return True
        began = time.perf_counter()
        worked = self._work_on_neural()
        self._spent_s += time.perf_counter() - began
        return worked

    def _work_on_neural(self) -> bool:
        if self._due_publication:
            self._write(self.publish)
        elif self._due_checkpoint:
            self._write(self.checkpoint)
        elif self._can_train:
            self.train()
        else:
            return False
        return True

    @property
    def _earned(self) -> int:
        """Rows that the traffic since the start allows to train on."""
        return self._allowed - self._allowed_before

    @property
    def _draft_model_can_work(self) -> bool:
        return self.draft_model is not None and self.draft_model.has_work(self._earned)

    @property
    def _is_draft_models_turn(self) -> bool:
        """Whether the draft model has had less than its share of the time, or the neural drafter has nothing to do."""
        if self.draft_model is None or not self._draft_model_can_work:
            return False
        behind = self.draft_model.spent_s <= self._model_share * (self.draft_model.spent_s + self._spent_s)
        return behind or not (self._can_train or self._due_publication or self._due_checkpoint)

    @property
    def _can_train(self) -> bool:
        taught = self._model_share < 1.0
        return taught and self._replay.ready and self._learner.tokens < self._allowed

    @property
    def _due_publication(self) -> bool:
        interval = self._clock() - self._gated_at >= self._settings.publish_interval_s
        earned = self._trained_s >= _TRAINING_PER_GATE * self._gate_s or not self._can_train
        return interval and earned and self._learner.steps > self._gated_step

    @property
    def _due_checkpoint(self) -> bool:
        interval = self._clock() - self._saved_at >= self._settings.checkpoint_interval_s
        return interval and self._learner.steps > self._saved_step

    def train(self) -> StepMetrics:
        """One optimiser step on a batch from the replay."""
        began = self._clock()
        rng = random.Random(f"{self._settings.seed}:{self._learner.steps}")
        with self._changed:
            windows = self._replay.sample(self._settings.batch_rows, rng)
            stats, composition = self._replay.stats(), self._replay.composition()
            newest = max(self.version, self._replay.newest_version)  # a log may hold drafts of later versions
        started_s = time.perf_counter()
        metrics, batch = self._step(windows, newest - self._settings.max_staleness)
        speed = Speed(time.perf_counter() - started_s, metrics.rows, step_flops(self.live.config, batch))
        with self._changed:
            for (sequence, _), missed in zip(windows, self._learner.missed, strict=True):
                self._replay.learned(sequence, missed)
            self._speed += speed
            computed = {"training_share": self._budget.computed_share(self._clock())}
        self._trained_s += self._clock() - began
        self.last_step = metrics
        replay = {f"replay_{name}": value for name, value in asdict(stats).items()}
        told = {**asdict(metrics), "acceptance_length": metrics.acceptance_length, **replay, "replay_rows": composition}
        told["staleness"] = staleness((sequence for sequence, _ in windows), newest)
        self._sinks.learning(told | computed | speed.per_s(self._peak), metrics.step)
        return metrics

    def _step(self, windows: Windows, oldest_version: int) -> tuple[StepMetrics, Batch]:
        """An optimiser step, with what this process computed of its batch."""
        if self.crew is not None:
            return self.crew.step(windows, oldest_version)
        batch = build_batch(
            windows,
            self._settings.ttt_steps,
            oldest_version=oldest_version,
            rejected=self._settings.learns_rejected,
            device=self._device,
        )
        return self._learner.step(batch), batch

    def _settle(self) -> None:
        """Before the learner is looked at: it may lag behind its workers."""
        if self.crew is not None:
            self.crew.settle()

    def _follow_rollback(self) -> None:
        """When the server has rejected the newest version, go back to the one that serves."""
        latest = self._store.latest()
        if latest is None or latest >= self.version:
            return
        log.warning("version %d was rejected; training goes on from version %d", self.version, latest)
        served = load_drafter(self._store.verify(latest).path, self._target)
        self.live.load_state_dict(served.state_dict())
        self._learner.restart(served)
        self.version = latest
        self.gated_rates = [float(rate) for rate in self._store.read(latest).metadata.get("gated_rates") or []]

    def publish(self) -> DrafterVersion | None:
        """Gate the drafter and publish it if it passes; None when it does not or nothing was held out yet.

        Raises one of `SAVE_ERRORS` when the disk does not take it; then nothing became visible.
        """
        self._settle()
        self._follow_rollback()
        self._gated_at, self._gated_step = self._clock(), self._learner.steps
        self._tell_drafts()
        with self._changed:
            sequences = self._replay.held_out(self._settings.gate_sequences)
        if not sequences:
            log.info("nothing was held out yet: no gate, no new version")
            return None
        self._adapt_vocabulary()
        k_max = self.config.speculation.k_max
        verdict = judge(self._learner.model, self.live, sequences, k_max, self._settings.gate_margin)
        self._trained_s, self._gate_s = 0.0, self._clock() - self._gated_at
        self.last_verdict = verdict
        with self._changed:
            self._budget.gated(verdict.candidate.length, verdict.live.length, self._clock())
        log.info("gate: %.3f against %.3f live", verdict.candidate.length, verdict.live.length)
        self._sinks.learning({"gate": verdict.numbers}, self._learner.steps)
        return self._release(verdict) if verdict.passed else None

    def _tell_drafts(self) -> None:
        """Report some of the drafts since the last gate, if that was asked for."""
        if self._samples is not None:
            with self._changed:
                rows = self._samples.take()
            self._sinks.drafts(rows, self._learner.steps)

    def _adapt_vocabulary(self) -> None:
        """Choose the draft vocabulary anew if the traffic asks for it."""
        with self._changed:
            counts = self._replay.emitted_counts.clone()
        model = self._learner.model
        ids = rechoose(model.draft_ids.cpu(), counts, self._settings.revocab_gain, self._target.special_ids)
        if ids is not None:
            log.info("draft vocabulary: %d of %d tokens change", int((~model.t2d.cpu()[ids]).sum()), len(ids))
            self._learner.change_vocabulary(ids.to(self._device))

    def _release(self, verdict: Verdict) -> DrafterVersion:
        metadata = verdict.metadata(self.version, self._learner.steps, self._learner.tokens)
        k_max = self.config.speculation.k_max
        self.checkpoint()  # first: whoever sees a version may count on its training being resumable
        published = self._store.publish(
            lambda directory: save_drafter(self._learner.model, directory, k_max, self._target), metadata
        )
        self.live.load_state_dict(self._learner.model.state_dict())
        self.version, self.gated_rates = published.number, metadata["gated_rates"]
        self._store.prune(self._settings.keep_versions)
        self._sinks.version(metadata, published.number)
        return published

    def checkpoint(self) -> None:
        """Write the trainer's state. Raises one of `SAVE_ERRORS` when the disk does not take it."""
        self._saved_at = self._clock()
        self._settle()
        with self._changed:
            counts = self._replay.emitted_counts.clone()
        save_checkpoint(self._checkpoints, self._learner, counts)
        self._saved_step = self._learner.steps
        if self.draft_model is not None:
            self.draft_model.checkpoint()
        self.unsaved = ""

    def status(self) -> dict[str, Any]:
        """Where training stands, as plain values."""
        with self._changed:
            stats = asdict(self._replay.stats())
            now_s = self._clock()
            budget = self._budget
            shares = {"training_share": budget.computed_share(now_s), "allowed_share": budget.share(now_s)}
            loaded = {"loaded_s": budget.loaded_s, "computed_loaded_s": budget.computed_loaded_s}
            speed = self._speed.per_s(self._peak)
        step, verdict = self.last_step, self.last_verdict
        return {
            "version": self.version,
            "step": self._learner.steps,
            "worker_pids": self.crew.processes if self.crew is not None else [os.getpid()],
            "tokens_trained": self._learner.tokens,
            "loss": step.loss if step else None,
            "train_acceptance_length": step.acceptance_length if step else None,
            "gate": asdict(verdict) if verdict else None,
            "replay": stats,
            "draft_model": self.draft_model.status() if self.draft_model is not None else None,
            "unsaved": self.unsaved,
            **shares,
            **loaded,
            **speed,
        }
