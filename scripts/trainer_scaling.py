"""What further training workers bring: rows a second, and whether the losses are those of one worker.

python scripts/trainer_scaling.py --workers 1 2 --rounds 3 --steps 4 --results docs/results.json
python scripts/trainer_scaling.py --workers 1 2 4 --device cuda --steps 50   # a GPU each, over NCCL

All numbers of workers train the same drafter on the same batches in one run, in turn, so that a busy machine slows them
alike. The rows are random: a step costs what it costs on real ones, and a loss says only whether it is the same.
"""

import argparse
import pickle
import random
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aurora.config import AuroraConfig, TrainerConfig
from aurora.default_model import model_directory, resolve_model
from aurora.results import Row, write_rows
from drafters import Eagle3Config, TargetWeights, initialise
from trainer.crew import Crew
from trainer.learner import Learner
from trainer.local_helpers import LOOPBACK, start_helpers
from trainer.sequence import Sequence
from trainer.shares import Windows, split

PROMPT, ROWS, SEQUENCES = 100, 400, 32
START_S = 600.0


@dataclass
class Run:
    """One number of workers and what it showed."""

    crew: Crew
    learner: Learner
    rows_per_s: list[float] = field(default_factory=list)  # by round
    losses: list[float] = field(default_factory=list)  # by step


def random_sequences(target: TargetWeights) -> list[Sequence]:
    """Requests of random tokens and states."""
    rng, hidden = np.random.default_rng(0), target.embed_tokens.shape[1]
    noise = torch.Generator().manual_seed(0)

    def states(width: int) -> torch.Tensor:
        return torch.randn(ROWS, width, generator=noise).to(torch.bfloat16)

    return [
        Sequence(
            request_id=str(i),
            domain="",
            position=0,
            prompt_tokens=PROMPT,
            ids=rng.integers(len(target.embed_tokens), size=ROWS + 1),
            hidden=states(hidden),
            aux=states(3 * hidden),
            drafts=(),
        )
        for i in range(SEQUENCES)
    ]


def batch(sequences: list[Sequence], rows: int, step: int) -> Windows:
    """Windows of whole requests, the last one cut."""
    drawn, found = random.Random(step).sample(sequences, len(sequences)), []
    for sequence in drawn:
        starts = range(sequence.first_start, sequence.end_start)[:rows]
        rows -= len(starts)
        if starts:
            found.append((sequence, starts))
    return found


def begin(workers: int, settings: TrainerConfig, target: TargetWeights, draft_vocab: int, device: str) -> Run:
    """A learner with so many workers, all of them ready."""
    learner = Learner(initialise(target, Eagle3Config.for_target(target.config, draft_vocab), 0), target, settings)
    mine = settings.model_copy(update={"workers": workers})
    crew = Crew(learner, start_helpers(mine, Path(target.name)), LOOPBACK, device, settings.worker_timeout_s)
    if not crew.wait_for_all(START_S):
        sys.exit(f"only {crew.size} of {workers} workers started within {START_S:g} s")
    return Run(crew, learner)


def train(run: Run, sequences: list[Sequence], rows: int, steps: int) -> float:
    """Take `steps` steps; returns rows a second."""
    began = time.perf_counter()
    for _ in range(steps):
        metrics, _ = run.crew.step(batch(sequences, rows, run.learner.steps), 0)
        run.losses.append(metrics.loss)
    return rows * steps / (time.perf_counter() - began)


def sending(sequences: list[Sequence], rows: int) -> tuple[float, float]:
    """(seconds to pack and unpack, bytes) of the second worker's half of a batch."""
    share = split(batch(sequences, rows, 0), 2, 3)[1]
    began = time.perf_counter()
    packed = pickle.dumps(share, protocol=pickle.HIGHEST_PROTOCOL)
    pickle.loads(packed)  # noqa: S301 (our own)
    return time.perf_counter() - began, len(packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=AuroraConfig().model, help="target (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers to compare; the first is 1")
    parser.add_argument("--rounds", type=int, default=3, help="each trains in turn so often (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps a round (default: %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=256, help="rollout starts a step (default: %(default)s)")
    parser.add_argument("--draft-vocab", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a worker (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, help="put rows of results there")
    options = parser.parse_args()
    if options.workers[0] != 1 or min(options.workers) < 1:
        parser.error(f"--workers {options.workers}: begin with 1, which the others are compared with")
    torch.set_num_threads(options.threads)
    settings = TrainerConfig(
        threads=options.threads, nice=0, precision="fp32", num_gpus=float(options.device == "cuda")
    )
    directory = model_directory(resolve_model(options.model, AuroraConfig().cache_dir))
    target = TargetWeights.load(directory, options.device)
    sequences = random_sequences(target)
    runs = {n: begin(n, settings, target, options.draft_vocab, options.device) for n in options.workers}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("train", total=(options.rounds + 1) * len(runs))
        for round_ in range(options.rounds + 1):
            for run in runs.values():
                speed = train(run, sequences, options.batch_rows, options.steps if round_ else 1)
                if round_:  # the first one warms up
                    run.rows_per_s.append(speed)
                progress.advance(task)
    for run in runs.values():
        run.crew.close()
    report(runs, sending(sequences, options.batch_rows), options.results)


def report(runs: dict[int, Run], sent: tuple[float, float], results: Path | None) -> None:
    """Print the table and keep it."""
    alone = runs[1]
    table = Table("workers", "rows/s, median", "least", "most", "last loss", "largest difference of a loss", "lost")
    command = shlex.join(["python", *sys.argv])
    for workers, run in runs.items():
        speed, base = statistics.median(run.rows_per_s), statistics.median(alone.rows_per_s)
        apart = max(abs(a - b) for a, b in zip(run.losses, alone.losses, strict=True))
        spread = (f"{min(run.rows_per_s):.0f}", f"{max(run.rows_per_s):.0f}")
        table.add_row(
            str(workers), f"{speed:.0f}", *spread, f"{run.losses[-1]:.6f}", f"{apart:.1e}", str(run.crew.lost)
        )
        if results is not None:
            place = "trainer_scaling", f"{workers} workers", "online_eagle3"
            rows = [Row(*place, "rows_per_s", speed, base, command), Row(*place, "loss_apart", apart, None, command)]
            write_rows(results, rows)
    Console().print(table)
    print(f"a helper's half of a batch: {sent[1] / 2**20:.2f} MiB, {sent[0] * 1e3:.1f} ms to pack and unpack")


if __name__ == "__main__":
    main()
