"""A line for every engine step: its work, what was expected of it, and what came (`speculation.step_log`)."""

import logging
from io import FileIO
from pathlib import Path

import msgspec

from aurora.step_time import StepWork

log = logging.getLogger(__name__)


class LoggedStep(msgspec.Struct, frozen=True):
    """One engine step. Predictions were made before it ran; 0.0 while the step-time model knew nothing."""

    requests: int  # that decode
    drafts: int
    prefill_tokens: int
    context_tokens: int
    neural_passes: int
    model_passes: int
    predicted_s: float
    measured_s: float
    predicted_tokens: float  # of the requests that decode
    emitted_tokens: int  # by them


class StepLog:
    """Appends steps to a JSONL file, which holds no text. One that cannot be written ends the log, not the engine."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._encoder = msgspec.json.Encoder()
        self._out: FileIO | None = None
        try:
            self._out = FileIO(file, "a")
        except OSError as error:
            self._give_up(error)

    def write(self, work: StepWork, outcome: tuple[float, float, float], emitted_tokens: int) -> None:
        """outcome: predicted seconds, predicted tokens, measured seconds."""
        if self._out is None:
            return
        predicted_s, predicted_tokens, measured_s = outcome
        step = LoggedStep(
            work.requests,
            work.drafts,
            int(work.prefill_tokens),
            work.context_tokens,
            work.draft_first + work.draft_more,
            work.model_first + work.model_more,
            predicted_s,
            measured_s,
            predicted_tokens,
            emitted_tokens,
        )
        try:
            self._out.write(self._encoder.encode(step) + b"\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("speculation.step_log %s: %s; steps are no longer logged", self._file, error.strerror)
        self._out = None


def read_steps(file: Path) -> list[LoggedStep]:
    """Raises ValueError naming the line that is none of a step log."""
    steps = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            steps.append(msgspec.json.decode(line, type=LoggedStep))
        except msgspec.MsgspecError as error:
            raise ValueError(f"{file}:{number}: {error}; give a file that `speculation.step_log` named") from error
    return steps
