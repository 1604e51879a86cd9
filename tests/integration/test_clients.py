"""Clients that know nothing of Aurora work as with any OpenAI endpoint, while drafters are swapped beneath them."""

from collections.abc import Callable

import pytest

from tests.clients.exercises import EXERCISES, WANT_SENSE
from tests.integration.process import ServedModel

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("exercise", [each for each in EXERCISES["openai"] if each not in WANT_SENSE])
def test_a_client_works_unchanged(learning: ServedModel, exercise: Callable[[str], None]) -> None:
    exercise(learning.url)
