"""Clients that know nothing of Aurora work as with any OpenAI endpoint, while drafters are swapped beneath them."""

from collections.abc import Callable
from importlib import metadata

import pytest

from tests.clients.exercises import EXERCISES
from tests.integration.process import ServedModel

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("package", "exercise"),
    [pytest.param(package, each, id=each.__name__) for package, mine in EXERCISES.items() for each in mine],
)
def test_a_client_works_unchanged(learning: ServedModel, package: str, exercise: Callable[[str], None]) -> None:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed; it is in the extra `clients`")
    exercise(learning.url)
