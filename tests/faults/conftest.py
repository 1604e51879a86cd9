"""What fault tests share with those of `tests/integration`."""

from tests.integration.conftest import tiny_model

__all__ = ["tiny_model"]
