"""The draft model's training, beside the neural drafter's in the same process and on the same replay.

Forward KL (or the loss configured) from the target's distribution to the draft model's, at every row that the target
generated, the recorded tokens being read. A candidate is gated on held-out requests, published in a store of its own
and checkpointed, as the neural drafter is. Rejected drafts are not learned from: they are rows of other drafters.
"""

import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aurora.config import AuroraConfig, TrainerConfig
from aurora.store import DrafterStore, DrafterVersion
from drafters.draft_files import FROZEN, ensure_draft_model, load_draft_model, save_draft_model
from drafters.draft_model import DraftModel
from drafters.target import TargetWeights
from drafters.vocab import rechoose
from trainer.buffer import Replay
from trainer.checkpoint import CheckpointRefused, load_checkpoint, save_checkpoint
from trainer.gate import Acceptance, Verdict
from trainer.learner import StepMetrics, uses_bf16
from trainer.losses import LOSSES, forward_kl, target_probabilities
from trainer.sequence import Sequence
from trainer.sinks import Sinks
from trainer.text import TextBatch, build_text_batch, greedy_text, predictions
from trainer.verify import accepted_drafts

log = logging.getLogger(__name__)

_TRAINING_PER_GATE = 4.0  # seconds of training that a second of judging must follow


class DraftModelLearner:
    """A draft model in training: parameters, AdamW's moments and the step counter."""

    def __init__(self, model: DraftModel, target: TargetWeights, config: TrainerConfig) -> None:
        self.model = model
        self.target = target
        self.config = config
        self.steps = 0
        self.tokens = 0  # rows trained on, passes counted
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._loss = LOSSES.get(config.loss, forward_kl)  # `accepted_length` is of rollouts, of which there are none
        self._warm_from = 0
        self._bf16 = uses_bf16(config.precision, target.lm_head.device.type)

    def step(self, batch: TextBatch) -> StepMetrics:
        """Read the texts, measure the loss at every judged row, go one step down its gradient."""
        began = time.perf_counter()
        rate = self.config.learning_rate * min(1.0, (self.steps - self._warm_from + 1) / self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.target.lm_head.device.type, torch.bfloat16, enabled=self._bf16):
            p = target_probabilities(batch.target_hidden.to(torch.float32), self.model.head)
            logits = predictions(self.model, batch).float()
            loss = self._loss(logits, p).mean()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.steps += 1
        self.tokens += batch.rows
        known = batch.truth >= 0
        right = self.model.draft_ids[logits.detach().argmax(-1)] == batch.truth
        return StepMetrics(
            step=self.steps,
            loss=loss.item(),
            loss_per_depth=(loss.item(),),
            acceptance_per_depth=(float(right[known].float().mean()) if bool(known.any()) else 0.0,),
            grad_norm=grad_norm.item(),
            learning_rate=rate,
            rows=batch.rows,
            rejected_rows=0,
            seconds=time.perf_counter() - began,
        )

    def restart(self, model: DraftModel) -> None:
        """Go on from another draft model's weights, with empty Adam moments and a new warm-up."""
        self.model.copy_from(model.state_dict())
        self.optimizer.state.clear()
        self._warm_from = self.steps

    def reload(self) -> None:
        """Follow a vocabulary that was written into the model from outside (a checkpoint)."""
        self.model.use_vocabulary(self.model.draft_ids)


def judge_draft_model(
    candidate: DraftModel, live: DraftModel, sequences: list[Sequence], k: int, margin: float
) -> Verdict:
    """Compare two draft models on held-out requests as `trainer.gate.judge` compares neural drafters."""
    new, old = _measure(candidate, sequences, k), _measure(live, sequences, k)
    return Verdict(new, old, passed=new.length > old.length and new.length >= old.length + margin)


def _measure(model: DraftModel, sequences: list[Sequence], k: int) -> Acceptance:
    """Greedy drafts of `k` tokens from every row whose next k tokens are known."""
    right = [0] * k
    rows = 0
    for sequence in sequences:
        runs = accepted_drafts(greedy_text(model, sequence, k), sequence)
        whole = runs[: max(len(sequence.ids) - 1 - k - sequence.first_start, 0)]
        right = [count + int((whole > depth).sum()) for depth, count in enumerate(right)]
        rows += len(whole)
    per_position = tuple(count / rows for count in right) if rows else ()
    return Acceptance(1.0 + sum(per_position), per_position, rows)


class DraftModelTraining:
    """Trains, gates and publishes one draft model; the thread that trains calls everything here."""

    def __init__(
        self,
        config: AuroraConfig,
        target: TargetWeights,
        replay: Replay,
        guard: AbstractContextManager[Any],
        *,
        sinks: Sinks,
        clock: Callable[[], float],
        device: str,
    ) -> None:
        """Resume from the checkpoint, else from the newest version, else from the target. `guard` guards `replay`.

        Raises DrafterRefused or ValueError when what is there does not belong to the target.
        """
        self._settings, self._k_max = config.trainer, config.speculation.k_max
        self._target, self._replay, self._guard = target, replay, guard
        self._sinks, self._clock, self._device = sinks, clock, device
        self._checkpoints = config.run_dir / "trainer" / "draft_model"
        self._store = DrafterStore(config.draft_model_dir)
        self.version = ensure_draft_model(self._store, target, config.speculation).number
        self.live = load_draft_model(self._directory, target)
        self.learner = DraftModelLearner(load_draft_model(self._directory, target), target, config.trainer)
        self._resume()
        self.gated_rates: list[float] = []  # conditional acceptance per position of the live version, as gated
        self.last_step: StepMetrics | None = None
        self.last_verdict: Verdict | None = None
        self._before = self.learner.tokens
        self.spent_s = 0.0  # by everything here
        self._gated_step = self._saved_step = self.learner.steps
        self._gated_at = self._saved_at = clock()
        self._trained_s = self._gate_s = 0.0  # since the last gate; of the last gate

    @property
    def _directory(self) -> Path:
        return self._store.read(self.version).path

    def _resume(self) -> None:
        try:
            if load_checkpoint(self._checkpoints, self.learner) is not None:
                log.info("the draft model resumes at step %d", self.learner.steps)
        except CheckpointRefused as error:
            log.warning("%s; training goes on from draft model version %d", error, self.version)

    def work(self, earned: int) -> None:
        """One unit: publish or checkpoint if due, else an optimiser step.

        earned: rows that may be trained on since the start.
        """
        began = time.perf_counter()
        can_train = self.can_train(earned)
        if self._due_publication(can_train):
            self.publish()
        elif self._due(self._saved_at, self._settings.checkpoint_interval_s, self._saved_step):
            self.checkpoint()
        elif can_train:
            self.train()
            self._trained_s += time.perf_counter() - began
        self.spent_s += time.perf_counter() - began

    def can_train(self, earned: int) -> bool:
        """Whether there are rows that it may still learn from."""
        return self._replay.ready and self.learner.tokens < self._before + earned

    def has_work(self, earned: int) -> bool:
        """Whether `work` would do anything."""
        return self.can_train(earned) or self._due_publication(can_train=False)

    def _due_publication(self, can_train: bool) -> bool:
        earned = self._trained_s >= _TRAINING_PER_GATE * self._gate_s or not can_train
        return earned and self._due(self._gated_at, self._settings.publish_interval_s, self._gated_step)

    def _due(self, last_at: float, interval_s: float, last_step: int) -> bool:
        return self._clock() - last_at >= interval_s and self.learner.steps > last_step

    def train(self) -> StepMetrics:
        """One optimiser step on a batch from the replay."""
        rng = random.Random(f"{self._settings.seed}:draft model:{self.learner.steps}")
        with self._guard:
            windows = self._replay.sample(self._settings.batch_rows, rng)
        self.last_step = metrics = self.learner.step(build_text_batch(windows, self._device))
        self._sinks.learning({**asdict(metrics), "acceptance_length": metrics.acceptance_length}, metrics.step)
        return metrics

    def publish(self) -> DrafterVersion | None:
        """Gate the draft model and publish it if it passes."""
        self._follow_rollback()
        self._gated_at, self._gated_step = self._clock(), self.learner.steps
        began = time.perf_counter()
        with self._guard:
            sequences = self._replay.held_out(self._settings.gate_sequences)
            counts = self._replay.emitted_counts.clone()
        if not sequences:
            return None
        ids = rechoose(
            self.learner.model.draft_ids.cpu(), counts, self._settings.revocab_gain, self._target.special_ids
        )
        if ids is not None:
            self.learner.model.use_vocabulary(ids.to(self._device))
        verdict = judge_draft_model(self.learner.model, self.live, sequences, self._k_max, self._settings.gate_margin)
        self._trained_s, self._gate_s = 0.0, time.perf_counter() - began
        self.last_verdict = verdict
        log.info("draft model's gate: %.3f against %.3f live", verdict.candidate.length, verdict.live.length)
        self._sinks.learning({"gate": verdict.numbers}, self.learner.steps)
        return self._release(verdict) if verdict.passed else None

    def _follow_rollback(self) -> None:
        """When the server has rejected the newest version, go back to the one that serves."""
        latest = self._store.latest()
        if latest is None or latest >= self.version:
            return
        log.warning("draft model version %d was rejected; training goes on from version %d", self.version, latest)
        served = load_draft_model(self._store.verify(latest).path, self._target)
        self.live.copy_from(served.state_dict())
        self.learner.restart(served)
        self.version = latest
        self.gated_rates = [float(rate) for rate in self._store.read(latest).metadata.get("gated_rates") or []]

    def _release(self, verdict: Verdict) -> DrafterVersion:
        metadata = verdict.metadata(self.version, self.learner.steps, self.learner.tokens)
        self.checkpoint()  # first: whoever sees a version may count on its training being resumable
        model, frozen = self.learner.model, self._directory / FROZEN
        published = self._store.publish(
            lambda directory: save_draft_model(model, directory, self._target, frozen), metadata
        )
        self.live.copy_from(model.state_dict())
        self.version, self.gated_rates = published.number, list(verdict.candidate.conditional)
        self._store.prune(self._settings.keep_versions)
        self._sinks.version(metadata, published.number)
        return published

    def checkpoint(self) -> None:
        """Write the training's state."""
        self._saved_at = self._clock()
        with self._guard:
            counts = self._replay.emitted_counts.clone()
        save_checkpoint(self._checkpoints, self.learner, counts)
        self._saved_step = self.learner.steps

    def status(self) -> dict[str, Any]:
        """Where training stands, as plain values."""
        return {
            "version": self.version,
            "step": self.learner.steps,
            "tokens_trained": self.learner.tokens,
            "loss": self.last_step.loss if self.last_step else None,
            "gate": asdict(self.last_verdict) if self.last_verdict else None,
        }
