"""Waiting for something that another process or thread does."""

from collections.abc import Callable

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed


def wait_until(happened: Callable[[], bool], limit_s: float, what: str, every_s: float = 0.05) -> None:
    """Return as soon as `happened()`. Raises TimeoutError naming `what` when it has not after `limit_s`."""
    often = wait_fixed(every_s)
    looks = Retrying(stop=stop_after_delay(limit_s), wait=often, retry=retry_if_result(lambda yes: not yes))
    try:
        looks(happened)
    except RetryError as error:
        raise TimeoutError(f"after {limit_s:g} s: {what}") from error
