"""What the steps of this engine cost on this machine, measured before it serves and kept for its next start.

Made-up requests run in batches of several sizes, and a `Drill` stands in the portfolio's place: it drafts and verifies
at random, so that the fit of the step-time model sees every cost apart from the others. Nobody learns from what these
requests say.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from aurora.config import AuroraConfig
from aurora.controller import Plan
from aurora.goodput import TABLE
from aurora.metrics import EngineReport
from aurora.step_time import StepTimeModel, StepWork
from aurora.store import DrafterVersion

if TYPE_CHECKING:
    from serve.engine import RunningEngine

log = logging.getLogger(__name__)

PREFIX = "aurora-calibration-"  # of request ids, which users cannot choose so: vLLM puts the route's name before theirs
_BATCHES = (1, 2, 4, 8, 16)
_OUTPUT_TOKENS = 20
_PROMPT_TOKENS = (16, 192)
_MADE_UP = 1  # the token that is drafted and verified
_VERSION = 3  # of what is kept; 2: a step lasts from one output to the next, 3: the steps themselves


def is_calibration(request_id: str) -> bool:
    return request_id.startswith(PREFIX)


class Drill:
    """Plans and drafts at random, in the portfolio's place."""

    def __init__(self, k_max: int, *, neural: bool) -> None:
        """neural: whether there is a neural drafter to run."""
        self._k_max = k_max
        self._neural = neural
        self._rng = np.random.default_rng(0)
        self.one_hot: dict[str, int] = {}  # as in `Portfolio`

    def plan(self) -> Plan:
        """The neural drafter reads or does not, and drafts a number of tokens."""
        if not self._neural or self._rng.random() < 0.4:
            return Plan(0, skip_drafter=True)
        return Plan(int(self._rng.integers(1, self._k_max + 1)), skip_drafter=False)

    def settle(self, limits: Mapping[str, int]) -> dict[str, list[int]]:
        """Drafts to verify of each request, up to its limit; a third of the steps verifies none."""
        longest = self._rng.integers(self._k_max + 1) if self._rng.random() < 2 / 3 else 0
        drafts = {r: [_MADE_UP] * int(self._rng.integers(min(k, longest) + 1)) for r, k in limits.items()}
        self.one_hot = dict.fromkeys(drafts, TABLE)
        return drafts


def costs_file(config: AuroraConfig, model_dir: Path, drafter: DrafterVersion) -> Path:
    """Where the costs of this model, machine and set of flags are kept."""
    what = {
        "version": _VERSION,
        "model": _digest(model_dir / "config.json"),
        "drafter": _digest(drafter.path / "config.json"),
        "drafters": config.speculation.drafters,
        "k_max": config.speculation.k_max,
        "sampled": config.speculation.sample_drafts,
        "captures": config.captures,
        "vllm": config.vllm_args,
        "machine": _machine(),
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return config.cache_dir.expanduser() / "step-costs" / f"{key[:16]}.json"


def known_costs(file: Path) -> StepTimeModel | None:
    """The step-time model of the steps that an earlier start drilled; None where none can be read."""
    try:
        rows = json.loads(file.read_text())["steps"]
        return StepTimeModel.measured([(StepWork(*row[:-1]), float(row[-1])) for row in rows])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: %r; step costs are measured again", file, error)
        return None


def keep_costs(file: Path, steps: Sequence[tuple[StepWork, float]]) -> None:
    """Keep what steps took for the next start. A disk that does not take them is no reason to stop."""
    written = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps({"steps": [[*dataclasses.astuple(work), seconds] for work, seconds in steps]}))
        written.replace(file)
    except OSError as error:
        log.warning("%s: %s; step costs are measured again at the next start", file, error.strerror)


async def calibrate(engine: "RunningEngine") -> None:
    """Let the engine measure its step costs, in some hundred steps; with the first request it keeps them."""
    started, rng = time.perf_counter(), np.random.default_rng(0)
    model = engine.client.model_config
    longest = min(_PROMPT_TOKENS[1], model.max_model_len - _OUTPUT_TOKENS - 1)
    for requests in _BATCHES:
        if requests > engine.args.max_num_seqs:
            break
        lengths = rng.integers(min(_PROMPT_TOKENS[0], longest), longest + 1, size=requests)
        prompts = [rng.integers(model.get_vocab_size(), size=length).tolist() for length in lengths]
        await asyncio.gather(*(_run(engine, f"{PREFIX}{requests}-{i}", prompt) for i, prompt in enumerate(prompts)))
    ((_, encoded),) = await engine.client.collective_rpc("aurora_drain")  # the traces are nobody's to learn from
    report = msgspec.msgpack.decode(encoded, type=EngineReport)
    seconds = time.perf_counter() - started
    log.info("%d steps calibrated in %.1f s, median error %.1f %%", report.steps, seconds, 100 * report.step_error)


async def _run(engine: "RunningEngine", request_id: str, prompt: list[int]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT_TOKENS, ignore_eos=True, detokenize=False)
    async for _ in engine.client.generate({"prompt_token_ids": prompt}, params, request_id):
        pass


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _machine() -> list[str]:
    """Processor, number of cores that may be used, and accelerators."""
    from vllm import __version__
    from vllm.platforms import current_platform

    lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    processor = next((line for line in lines if line.startswith("model name")), platform.processor())
    device = "" if current_platform.is_cpu() else str(current_platform.get_device_name())
    return [__version__, processor, str(len(os.sched_getaffinity(0))), device]
