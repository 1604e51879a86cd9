"""Sampling under speculation keeps the target's distribution: thousands of samples with and without drafts.

Stock vLLM 0.32 fails this on a CPU (`serve/sampling_shim.py`); the last test fails on the day it no longer does.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats

from aurora.config import SpeculationConfig
from aurora.environment import engine_environment
from aurora.metrics import EngineReport
from aurora.store import DrafterStore, DrafterVersion
from aurora.trace import TABLE_VERSION
from drafters import TargetWeights, ensure_draft_model, ensure_drafter

pytestmark = pytest.mark.engine

PROMPTS = ([5, 6, 7, 8], list(range(40, 70)), [9] * 12, [300, 4, 120, 33, 77])
Settings = tuple[dict[str, float], ...]
SETTINGS: Settings = ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_k": 8})
SAMPLES = 2000
_PERMUTATIONS = 60_000
TOKENS = 3  # compared; the requests are longer, because the last tokens of one are never drafted
_MIXED = "tests.integration.mixed_scheduler.MixedScheduler"
Samples = list[list[tuple[int, ...]]]  # [setting x prompt][sample]


@pytest.fixture(scope="module")
def drafter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DrafterVersion:
    store = DrafterStore(tmp_path_factory.mktemp("store"))
    return ensure_drafter(store, tiny_model, SpeculationConfig(draft_vocab=300), 0)


@pytest.fixture(scope="module")
def draft_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DrafterVersion:
    """With nearly all layers of the target, so that it is right often enough."""
    store = DrafterStore(tmp_path_factory.mktemp("models"))
    target = TargetWeights.load(tiny_model)
    return ensure_draft_model(store, target, SpeculationConfig(draft_vocab=300, draft_layers=6))


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment().items():
            patch.setenv(name, value)
        yield


def _sample(
    model: Path, *, install: dict[str, Any] | None = None, settings: Settings = SETTINGS, **engine: Any
) -> tuple[Samples, EngineReport | None]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=True,
        seed=1,
        **engine,
    )
    try:
        if install is not None:
            llm.collective_rpc("aurora_install", args=(install,))
        samples: Samples = []
        for setting in settings:
            params = SamplingParams(**setting, n=SAMPLES, max_tokens=TOKENS + 3, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
            samples += [[tuple(o.token_ids[:TOKENS]) for o in output.outputs] for output in outputs]
        report = None
        if install is not None:
            ((_, encoded),) = llm.collective_rpc("aurora_drain")
            report = msgspec.msgpack.decode(encoded, type=EngineReport)
        return samples, report
    finally:
        llm.llm_engine.engine_core.shutdown()


def _speculate(drafter: DrafterVersion, method: str) -> dict[str, Any]:
    return {
        "speculative_config": {
            "method": "eagle3",
            "model": str(drafter.path),
            "num_speculative_tokens": 3,
            "draft_sample_method": method,
        }
    }


def _aurora(
    drafter: DrafterVersion, method: str, scheduler: str, draft_model: DrafterVersion | None = None
) -> dict[str, Any]:
    drafters = ["eagle3", "ngram", *(["model"] if draft_model is not None else [])]
    return {
        **_speculate(drafter, method),
        "scheduler_cls": scheduler,
        "worker_extension_cls": "serve.worker.AuroraWorker",
        "additional_config": {"aurora": {"fixed_k": 3, "drafters": drafters}},
        "install": {
            "sink_bytes": 0,
            "prompt_tokens": 0,
            "top_m": 0,
            "codec": "bf16",
            "store_dir": str(drafter.path.parent),
            "version": drafter.number,
            "gated_rates": [],
            "draft_model": draft_model and {"store_dir": str(draft_model.path.parent), "version": draft_model.number},
        },
    }


def _p_values(first: Samples, second: Samples) -> list[float]:
    """Two-sample p for each setting and prompt: chi-square of the first 1, 2 and 3 tokens together, total variation."""
    pairs = list(zip(first, second, strict=True))
    joint = [(Counter(s[:n] for s in a), Counter(s[:n] for s in b)) for a, b in pairs for n in range(1, TOKENS + 1)]
    return [_chi_square(a, b) for a, b in joint] + [_total_variation(a, b) for a, b in joint[::TOKENS]]


def _total_variation(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float:
    """Permutation test: how often two halves of all the samples are as far apart as the two that were taken."""
    counts = np.array([[c[key] for key in a | b] for c in (a, b)])
    halves = np.random.default_rng(0).multivariate_hypergeometric(counts.sum(0), a.total(), size=_PERMUTATIONS)
    apart = np.abs(2 * halves - counts.sum(0)).sum(1)
    return float((1 + (apart >= np.abs(counts[0] - counts[1]).sum()).sum()) / (1 + _PERMUTATIONS))


def _chi_square(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float:
    """Outcomes that are seen fewer than ten times in all are counted as one."""
    common = [key for key in a | b if a[key] + b[key] >= 10]
    table = [[c[key] for key in common] + [c.total() - sum(c[key] for key in common)] for c in (a, b)]
    table = [[row[i] for i in range(len(row)) if table[0][i] + table[1][i]] for row in table]
    return float(stats.chi2_contingency(table).pvalue) if len(table[0]) > 1 else 1.0


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Samples:
    """What the target alone says."""
    return _sample(tiny_model)[0]


@pytest.mark.parametrize(
    ("method", "scheduler", "versions"),
    [
        ("greedy", "serve.scheduler.AuroraScheduler", {1}),
        ("probabilistic", _MIXED, {1, TABLE_VERSION, -1}),
    ],
)
def test_drafts_leave_the_distribution_as_it_is(
    method: str,
    scheduler: str,
    versions: set[int],
    target: Samples,
    tiny_model: Path,
    drafter: DrafterVersion,
    draft_model: DrafterVersion,
) -> None:
    model = draft_model if min(versions) < TABLE_VERSION else None
    samples, report = _sample(tiny_model, **_aurora(drafter, method, scheduler, model))
    assert report is not None
    assert set(report.accepted_tokens) == versions
    assert min(report.accepted_tokens.values()) > 500, "drafts were accepted, so speculation had its say"
    p = _p_values(target, samples)
    assert len(p) == len(SETTINGS) * len(PROMPTS) * (TOKENS + 1)
    assert min(p) * len(p) > 0.001, f"smallest of {len(p)} p-values (Bonferroni): {sorted(p)[:5]}"


def test_the_repair_is_still_needed(target: Samples, tiny_model: Path, drafter: DrafterVersion) -> None:
    settings = SETTINGS[:1]  # top-k alone ends the engine without the repair
    samples, _ = _sample(tiny_model, settings=settings, **_speculate(drafter, "greedy"))
    p = _p_values(target[: len(samples)], samples)
    assert min(p) < 1e-9, "stock vLLM samples correctly now: remove serve/sampling_shim.py"
