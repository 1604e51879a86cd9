"""Engines that several integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.process import START_LIMIT_S, ServedModel
from tests.integration.tiny_model import write_model

SMALL = ("--max-model-len=512", "--max-num-batched-tokens=256", f"--kv-cache-memory-bytes={1 << 28}")
LEARNING = (
    *SMALL,
    "--k-max=3",
    "--drafters=eagle3,ngram,model",
    "--set=speculation.draft_layers=3",
    "--set=trainer.duty=1.0",
    "--draft-vocab=256",
    "--publish-interval=3",
    "--set=trainer.learning_rate=0.002",
    "--set=trainer.holdout=0.3",
    "--set=trainer.nice=0",
    "--set=capture.interval_s=0.2",
    "--set=reporter.interval_s=0.5",
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def _learning(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    server = ServedModel(tiny_model, tmp_path_factory.mktemp("learning"), *LEARNING)
    server.wait_ready(START_LIMIT_S)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def learning(_learning: ServedModel) -> Iterator[ServedModel]:
    """The tiny model served with all three drafters and learning; its trainer stands still between the modules."""
    _learning.let_train(True)
    yield _learning
    _learning.let_train(False)


@pytest.fixture(scope="session")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The same model without speculation."""
    server = ServedModel(tiny_model, tmp_path_factory.mktemp("plain"), "--no-speculation", *SMALL)
    server.wait_ready(START_LIMIT_S)
    yield server
    assert server.stop() == 0
