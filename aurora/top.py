"""`aurora status` and `aurora top`: what running servers do, once or until `q` or Ctrl-C.

Where the output is no terminal `top` writes one line for each look, which `--json` makes one object.
"""

import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from aurora.drafter_records import VersionRecord
from aurora.status_view import Frame, one_line
from aurora.watch import DEFAULT_URL, Watch, WatchOptions

if TYPE_CHECKING:
    from rich.console import Console

_REDRAWS_PER_S = 2  # so that a window of another size is filled soon
_STATUS_WIDTH = 100  # columns where the output is no terminal


def run_status(options: WatchOptions) -> int:
    """Show what the servers do now, over `interval` seconds; 1 if one is not well, else 0. Raises UserError."""
    from rich.console import Console

    watch = Watch(options)
    watch.first_look()
    time.sleep(options.interval)
    watch.look()
    frame = watch.frame("status  " + _title(options))
    if options.as_json:
        print(json.dumps(to_json(frame), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _STATUS_WIDTH).print(frame)
    return 0 if frame.well else 1


def run_top(options: WatchOptions) -> int:
    """Show it again and again until `q`, Ctrl-C or `count` looks; returns 0. Raises UserError (see `Watch`)."""
    from rich.console import Console

    watch = Watch(options)
    watch.first_look()
    console = Console()
    title = "top  " + _title(options)
    with _ended_in_order():
        if console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty() and not options.as_json:
            _show_live(watch, options, console, title)
        else:
            _write_lines(watch, options, title)
    return 0


def _title(options: WatchOptions) -> str:
    first, *more = options.urls or (DEFAULT_URL,)
    return f"{first} and {len(more)} more" if more else first


def _looks(watch: Watch, options: WatchOptions, wait: Callable[[float], bool]) -> Iterator[None]:
    """Yields after each look, the first of which was taken; ends when `wait` says so or after `count`."""
    shown = 0
    while True:
        yield
        shown += 1
        if shown == options.count or wait(options.interval):
            return
        watch.look()


def _write_lines(watch: Watch, options: WatchOptions, title: str) -> None:
    try:
        for _ in _looks(watch, options, _sleep):
            frame = watch.frame(title)
            print(json.dumps(to_json(frame)) if options.as_json else one_line(frame), flush=True)
    except BrokenPipeError:  # whoever read the lines has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_live(watch: Watch, options: WatchOptions, console: "Console", title: str) -> None:
    from rich.live import Live

    with _keys() as pressed, Live(console=console, screen=True, refresh_per_second=_REDRAWS_PER_S) as live:
        for _ in _looks(watch, options, pressed):
            live.update(_Screen(watch.frame(f"{title}  q quits")), refresh=True)


@dataclass(frozen=True)
class _Screen:
    """A frame as high as the screen is when it is drawn."""

    frame: Frame

    def __rich_console__(self, _console: "Console", options: Any) -> Iterator[Frame]:
        yield self.frame.fitted(options.max_height)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Yields `pressed(seconds)`: wait so long, True at once if `q` is pressed. Nobody's line editing is in the way."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield lambda seconds: _pressed_q(keyboard, seconds)
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _pressed_q(keyboard: int, seconds: float) -> bool:
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        if select.select([keyboard], [], [], left_s)[0]:
            pressed = os.read(keyboard, 32)
            if not pressed or b"q" in pressed.lower():
                return True
    return False


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Ctrl-C ends what is inside without a word, and SIGTERM as an exit: the terminal is left as it was."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def to_json(frame: Frame) -> dict[str, Any]:
    """A frame for programs: the same numbers under the names of `aurora.status.Status`."""
    store: Sequence[VersionRecord] | None = frame.store
    return {
        "state": frame.state,
        "well": frame.well,
        "window_s": frame.window_s,
        **asdict(frame.whole),
        "each": [asdict(replica) for replica in frame.replicas],
        "silent": dict(frame.silent),
        "store": [asdict(record) for record in store] if store is not None else None,
    }
