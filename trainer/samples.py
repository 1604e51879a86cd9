"""Some verified drafts as text, for people who want to see what is accepted and what not (`reporter.draft_tables`)."""

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from aurora.trace import DraftTrace

_KEPT = 64  # between two tables


class DraftSamples:
    """A uniform sample of the drafts verified since it was last taken (reservoir sampling; Vitter 1985, R)."""

    def __init__(self, decode: Callable[[Sequence[int]], str], seed: int) -> None:
        """decode: token ids to text."""
        self._decode = decode
        self._rng = random.Random(seed)
        self._rows: list[DraftTrace] = []
        self._seen = 0

    def add(self, traces: Iterable[DraftTrace]) -> None:
        """Look at the drafts among `traces`."""
        for trace in traces:
            if not trace.k:
                continue
            self._seen += 1
            if len(self._rows) < _KEPT:
                self._rows.append(trace)
            elif (place := self._rng.randrange(self._seen)) < _KEPT:
                self._rows[place] = trace

    def take(self) -> list[list[Any]]:
        """Rows of version, domain, k, accepted and rejected drafts, and what the target said instead or on top."""
        rows, self._rows, self._seen = self._rows, [], 0
        return [self._row(trace) for trace in rows]

    def _row(self, trace: DraftTrace) -> list[Any]:
        drafts = trace.input_ids[-trace.k :].tolist()
        parts = drafts[: trace.accepted], drafts[trace.accepted :], trace.emitted_ids[trace.accepted :].tolist()
        return [trace.drafter_version, trace.domain, trace.k, *map(self._decode, parts)]


def text_decoder(model_dir: Path) -> Callable[[Sequence[int]], str]:
    """The decoder of a model's tokenizer; token ids as they are when there is no `tokenizer.json`."""
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        return lambda ids: " ".join(map(str, ids))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    return decode
