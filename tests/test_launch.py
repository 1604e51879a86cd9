import os
import signal
from collections.abc import Iterator

import pytest

from aurora.launch import _StopSignals


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the process's own signal handlers back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_ends_the_pause_before_a_restart_and_the_second_one_ends_the_process(handlers: None) -> None:
    asked: list[str] = []
    signals = _StopSignals(lambda: asked.append("stop"), lambda: asked.append("kill"))
    signals.serving = True
    assert not signals.wait(0.01)
    assert not signals.received
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.wait(600), "returns at once"
    assert asked == ["stop"]
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == 128 + signal.SIGINT
    assert asked == ["stop"], "asked to stop once"


def test_what_is_not_served_yet_is_not_asked_to_stop(handlers: None) -> None:
    asked: list[str] = []
    signals = _StopSignals(lambda: asked.append("stop"), lambda: asked.append("kill"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.wait(600)
    assert asked == ["kill"]
