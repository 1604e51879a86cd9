"""Where the trainer's results go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sinks:
    """Of one drafter's training; all are called from the training thread and must return at once."""

    learning: Callable[[dict[str, Any], int], None] = lambda _metrics, _step: None
    version: Callable[[dict[str, Any], int], None] = lambda _metadata, _number: None
    drafts: Callable[[list[list[Any]], int], None] = lambda _rows, _step: None  # of `DraftSamples.take`
