"""A line for every engine step: its work, what was expected of it, and what came (`speculation.step_log`)."""

from pathlib import Path

import msgspec

from aurora.step_time import StepWork


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
    """Appends steps to a JSONL file. It holds no text."""

    def __init__(self, file: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        self._out = file.open("ab", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def write(self, work: StepWork, outcome: tuple[float, float, float], emitted_tokens: int) -> None:
        """outcome: predicted seconds, predicted tokens, measured seconds."""
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
        self._out.write(self._encoder.encode(step) + b"\n")


def read_steps(file: Path) -> list[LoggedStep]:
    """Raises ValueError naming the line that is none of a step log."""
    steps = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            steps.append(msgspec.json.decode(line, type=LoggedStep))
        except msgspec.MsgspecError as error:
            raise ValueError(f"{file}:{number}: {error}; give a file that `speculation.step_log` named") from error
    return steps
