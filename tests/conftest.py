"""Fixtures that several test files share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from aurora.trace import DraftTrace

if TYPE_CHECKING:
    from drafters import TargetWeights

# Timings of single examples say nothing on a machine that is shared with engines and trainers.
settings.register_profile("aurora", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aurora")

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Directory of SmolLM2-135M-Instruct in the user's cache, exported on first use."""
    from aurora.config import AuroraConfig
    from aurora.default_model import export_default_model

    return export_default_model(AuroraConfig().cache_dir)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny target model (`tests.tiny`)."""
    from tests.tiny import write_target

    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(directory: Path) -> "TargetWeights":
    """What drafters and trainer use of that model."""
    from drafters import TargetWeights

    return TargetWeights.load(directory)


@pytest.fixture
def make_trace() -> Callable[..., DraftTrace]:
    """A verification step of k = 2 drafts, one of them accepted, at hidden size 4; keywords replace its fields."""

    def make(**fields: object) -> DraftTrace:
        k = int(fields.get("k", 2))
        plain = {
            "request_id": "r",
            "step": 1,
            "time_s": 0.5,
            "position": 10,
            "prompt_tokens": 8,
            "input_ids": np.arange(k + 1, dtype=np.int32),
            "emitted_ids": np.array([1, 7], np.int32),
            "k": k,
            "accepted": 1,
            "draft_q": np.ones(k, np.float32),
            "top_q_ids": np.zeros((k, 0), np.int32),
            "top_q": np.zeros((k, 0), np.float32),
            "hidden": np.arange((k + 1) * 4, dtype=np.uint16).reshape(k + 1, 4),
            "aux": np.arange((k + 1) * 12, dtype=np.uint16).reshape(k + 1, 12),
            "drafter_version": 3,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
        }
        return DraftTrace(**plain | fields)

    return make
