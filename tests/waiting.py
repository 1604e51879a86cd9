"""Waiting for something that another process or thread does."""

from collections.abc import Callable

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed


def wait_until(happened: Callable[[], bool], limit_s: float, what: str) -> None:
    """Return as soon as `happened()`. Raises AssertionError naming `what` when it has not after `limit_s`."""
    looks = Retrying(stop=stop_after_delay(limit_s), wait=wait_fixed(0.05), retry=retry_if_result(lambda yes: not yes))
    try:
        looks(happened)
    except RetryError as error:
        raise AssertionError(f"after {limit_s:g} s: {what}") from error
