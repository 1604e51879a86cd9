"""Who wrote each token of a request that asks for it (`aurora_token_sources: true`): the target, or which drafter.

The scheduler notes it for each step and puts it on what vLLM sends from the engine to the HTTP process anyway
(`EngineCoreOutput.kv_transfer_params`); there it is taken off again before vLLM sees it (seam:
`AsyncLLM.output_processor.process_outputs`, vLLM 0.32-0.33) and kept, under a random name that the HTTP server gave the
request, until the answer goes out (`serve.source_answers`). Only kinds are kept, no text, for as long as the request
is open. Requests that do not ask cost a look into an empty table.
"""

import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from aurora.goodput import MODEL, NEURAL, TABLE
from aurora.trace import TARGET

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

_NOTE = "aurora_token_sources"  # in kv_transfer_params: [name of the request, drafter's kind, accepted, tokens]
_KINDS = {NEURAL: "eagle3", TABLE: "ngram", MODEL: "model"}
UNKNOWN = "unknown"


class SourceNotes:
    """The scheduler's part: what each request that asks emitted in the step at hand."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # request -> under which name its sources are waited for
        self._step: dict[str, tuple[str, int]] = {}  # request -> drafter's kind, its drafts that were accepted

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._names

    def begin(self, request_id: str, name: str) -> None:
        """A request asks for its sources."""
        self._names[request_id] = name

    def finish(self, request_id: str) -> None:
        self._names.pop(request_id, None)

    def wrote(self, request_id: str, drafter: int, emitted: int) -> None:
        """`emitted` tokens came of a step: accepted drafts of a drafter, then one of the target's own."""
        self._step[request_id] = (_KINDS[drafter], max(emitted - 1, 0))

    def attach(self, outputs: "Mapping[int, EngineCoreOutputs]") -> None:
        """Put the notes of the step on its outputs, which may have lost tokens after a stop."""
        if not self._step:
            return
        for output in (output for batch in outputs.values() for output in batch.outputs):
            if output.request_id in self._step and output.new_token_ids:
                kind, accepted = self._step[output.request_id]
                note = [self._names[output.request_id], kind, accepted, len(output.new_token_ids)]
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), _NOTE: note}
        self._step = {}


class SourceBook:
    """The HTTP process's part: the sources of open requests, each under its name, until they are taken."""

    def __init__(self, *, speculates: bool) -> None:
        """speculates: whether there are drafters; without them the target writes everything and nobody says so."""
        self._default = UNKNOWN if speculates else TARGET
        self._waiting: dict[str, deque[str]] = {}

    def open(self) -> str:
        """A name for a request, which nobody can guess."""
        name = secrets.token_hex(16)
        self._waiting[name] = deque()
        return name

    def close(self, name: str) -> None:
        """Its answer is complete, or nobody wants it any more."""
        self._waiting.pop(name, None)

    def add(self, name: str, kind: str, accepted: int, tokens: int) -> None:
        """A step's `tokens`, of which the first `accepted`, or as many as there are, were drafted."""
        if name in self._waiting:
            drafted = min(accepted, tokens)
            self._waiting[name].extend([*[kind] * drafted, *[TARGET] * (tokens - drafted)])

    def take(self, name: str, tokens: int) -> list[str]:
        """The sources of a request's next `tokens`."""
        waiting = self._waiting[name]
        return [waiting.popleft() if waiting else self._default for _ in range(tokens)]

    def listen(self, output_processor: Any) -> None:
        """Take the notes off everything that comes from the engine."""
        process = output_processor.process_outputs

        def process_outputs(engine_core_outputs: "list[EngineCoreOutput]", *args: Any, **kwargs: Any) -> Any:
            if self._waiting:
                self._read(engine_core_outputs)
            return process(engine_core_outputs, *args, **kwargs)

        output_processor.process_outputs = process_outputs

    def _read(self, outputs: "Iterable[EngineCoreOutput]") -> None:
        for output in outputs:
            note = (output.kv_transfer_params or {}).get(_NOTE)
            if note is not None:
                self.add(*note)
                output.kv_transfer_params = {k: v for k, v in output.kv_transfer_params.items() if k != _NOTE} or None
