"""`aurora record`: serves a data set once and keeps what replaying it needs (`trainer.recording`).

The engine is the one that `aurora serve` starts, with its capture, and drafts nothing. Requests run many at a time;
each is kept when it is complete, and those of an earlier run are not served again.
"""

import asyncio
import dataclasses
import itertools
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aurora.config import DEFAULT_MODEL, AuroraConfig, UserError, require_positive
from aurora.prompts import Conversation, read_prompts

if TYPE_CHECKING:
    from serve.offline import OfflineEngine
    from trainer.recording import Manifest, RecordingWriter
    from trainer.sequence import OpenSequence

_SINK_MIB = 4096  # nothing may be dropped: drained every `_DRAIN_S`
_DRAIN_S = 0.5
_MIB = 1 << 20


@dataclass(frozen=True)
class RecordOptions:
    """What to record; `aurora record` has a flag for each. Raises UserError for values that make no sense."""

    dataset: str
    out: Path
    model: str = DEFAULT_MODEL
    split: str = "train"
    variant: str | None = None
    domain: str | None = None
    limit: int | None = None
    per_domain: int | None = None
    concurrency: int = 32
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_gib: float = 8.0
    vllm_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "concurrency", "max_tokens", "max_gib", "limit", "per_domain")
        for name in ("temperature", "top_k"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")


def run(options: RecordOptions) -> int:
    """Record; 0 when all is there, 1 when `max_gib` ended it. Raises UserError for what the user can mend."""
    conversations = select(
        read_prompts(
            options.dataset, split=options.split, variant=options.variant, domain=options.domain, limit=options.limit
        ),
        options.per_domain,
    )
    from aurora.default_model import model_directory, resolve_model
    from serve.offline import OfflineEngine
    from trainer.recording import RecordingWriter

    with tempfile.TemporaryDirectory(prefix="aurora-record-") as scratch:
        config = _config(options, Path(scratch))
        model_dir = model_directory(resolve_model(config.model, config.cache_dir))
        writer = RecordingWriter(options.out.expanduser(), _manifest(options, model_dir))
        missing = [c for c in conversations if not _complete(c, writer.keys)]
        if missing:
            engine = OfflineEngine(config, model_dir)
            try:
                asyncio.run(Recorder(engine, options, writer).record(missing))
            finally:
                engine.close()
    done = sum(_complete(c, writer.keys) for c in conversations)
    print(f"{done} of {len(conversations)} conversations in {options.out}, {writer.nbytes / _MIB:.0f} MiB")
    return int(done < len(conversations))


def select(conversations: Sequence[Conversation], per_domain: int | None) -> list[Conversation]:
    """Each conversation once, the first `per_domain` of each domain, in their order."""
    kept: dict[tuple[str, ...], Conversation] = {}
    counts: dict[str, int] = {}
    for conversation in conversations:
        if conversation.turns in kept or (per_domain and counts.get(conversation.domain, 0) >= per_domain):
            continue
        kept[conversation.turns] = conversation
        counts[conversation.domain] = counts.get(conversation.domain, 0) + 1
    return list(kept.values())


def _config(options: RecordOptions, scratch: Path) -> AuroraConfig:
    return AuroraConfig.model_validate(
        {
            "model": options.model,
            "run_dir": scratch,
            "vllm_args": (*options.vllm_args, "--no-enable-prefix-caching"),  # cached prompts have no features
            "speculation": {"fixed_k": 0, "drafters": ("eagle3",), "draft_vocab": 256},  # nothing is drafted
            "capture": {"prompt_tokens": 1 << 30, "codec": "bf16", "sink_mib": _SINK_MIB, "interval_s": _DRAIN_S},
        }
    )


def _manifest(options: RecordOptions, model_dir: Path) -> "Manifest":
    from drafters import TargetWeights
    from trainer.recording import Manifest

    return Manifest(
        model=options.model,
        fingerprint=TargetWeights.load(model_dir).fingerprint,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def _complete(conversation: Conversation, keys: set[str]) -> bool:
    from trainer.recording import request_key

    return all(request_key(conversation.turns, turn) in keys for turn in range(len(conversation.turns)))


class Recorder:
    """Sends conversations to an engine and writes each request once all of its traces are here."""

    def __init__(
        self, engine: "OfflineEngine", options: RecordOptions, writer: "RecordingWriter", drain_s: float = _DRAIN_S
    ) -> None:
        self._engine = engine
        self._drain_s = drain_s
        self._options = options
        self._writer = writer
        self._open: dict[str, OpenSequence] = {}
        self._answered: dict[str, str] = {}  # key -> domain, of requests that wait for their last traces

    async def record(self, conversations: Sequence[Conversation]) -> None:
        """All of them, or as many as `max_gib` allows; what was answered is on disk however this ends."""
        await self._engine.start()
        queue = self._within_limit(conversations)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("record", total=len(conversations))

            async def work() -> None:
                for conversation in queue:
                    await self._converse(conversation)
                    progress.update(task, advance=1, description=f"record, {self._writer.nbytes / _MIB:.0f} MiB")

            try:
                async with asyncio.TaskGroup() as draining:
                    drain = draining.create_task(self._drain_forever())
                    async with asyncio.TaskGroup() as serving:
                        for _ in range(self._options.concurrency):
                            serving.create_task(work())
                    drain.cancel()
                await self._drain()
            finally:
                self._writer.flush()

    def _within_limit(self, conversations: Sequence[Conversation]) -> Iterator[Conversation]:
        limit = self._options.max_gib * 1024 * _MIB
        return itertools.takewhile(lambda _: self._writer.nbytes < limit, conversations)

    async def _converse(self, conversation: Conversation) -> None:
        """Serve the turns one after the other, each with all that was said before."""
        from serve.offline import Sampling
        from trainer.recording import request_key

        options = self._options
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(conversation.turns):
            key = request_key(conversation.turns, turn)
            seed = options.seed ^ zlib.crc32(key.encode())
            sampling = Sampling(options.temperature, options.top_p, options.top_k, options.max_tokens, seed)
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": await self._engine.chat(key, messages, sampling)})
            self._answered[key] = conversation.domain

    async def _drain_forever(self) -> None:
        while True:
            await asyncio.sleep(self._drain_s)
            await self._drain()

    async def _drain(self) -> None:
        """Take the traces so far; write the requests that had been answered before they were asked for."""
        from trainer.sequence import OpenSequence

        complete, self._answered = self._answered, {}
        for trace in await self._engine.drain():
            key = trace.request_id.rpartition("-")[0]
            if key not in self._open:
                self._open[key] = OpenSequence.begin(trace)
            if not self._open[key].knows(trace):  # a preempted request is computed again
                self._open[key].append(trace)
        for key, domain in complete.items():
            sequence = self._open.pop(key).snapshot()
            self._writer.add(dataclasses.replace(sequence, request_id=key, domain=domain))
