"""Looks at running servers again and again, and what was seen so far as one picture.

The first look decides: a server that does not answer, wants another key or is not Aurora is the user's to put right.
Later a server that is away is shown as such and asked again: it may be restarting.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aurora.config import UserError, require_positive
from aurora.drafter_records import VersionRecord, open_store, records
from aurora.endpoint import Endpoint, NoAnswer, read_client_key
from aurora.growth import Look, split_replicas
from aurora.scrape import parse_samples
from aurora.status import check_aurora, latest_acceptance, status
from aurora.status_view import Frame

DEFAULT_URL = "http://127.0.0.1:8000"
_WINDOW_S = 30.0  # that mixes and acceptance are of
_SERIES = 240  # values kept for the small graphs


@dataclass(frozen=True)
class WatchOptions:
    """What to look at, and how often. Raises UserError for a value that cannot be used."""

    urls: tuple[str, ...] = (DEFAULT_URL,)
    api_key_file: Path | None = None  # None: AURORA_API_KEY
    run_dir: Path | None = None
    interval: float = 2.0  # seconds between two looks
    count: int | None = None  # looks to show; None: until stopped
    as_json: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "interval", "count")


class Watch:
    """Looks at servers and remembers what it saw; `clock` is monotonic, in seconds."""

    def __init__(self, options: WatchOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UserError for a URL, a key or a run directory that cannot be used."""
        self._clock = clock
        key = read_client_key(options.api_key_file)
        self._endpoints = [Endpoint.open(url, key) for url in options.urls or (DEFAULT_URL,)]
        self._store = open_store(options.run_dir, "eagle3") if options.run_dir is not None else None
        self._looks: dict[str, deque[Look]] = {}  # by replica
        self._silent: dict[str, str] = {}  # replica -> why there is no answer
        self._present: set[str] = set()  # replicas that answered last
        self._state = ""
        self._speeds: deque[float | None] = deque(maxlen=_SERIES)
        self._acceptance: deque[float | None] = deque(maxlen=_SERIES)
        self._swaps = -1
        self._swapped_s: float | None = None

    def first_look(self) -> None:
        """Look for the first time. Raises UserError unless every URL answers as an Aurora server does."""
        self.look()
        if self._silent:
            raise UserError(
                f"{next(iter(self._silent.values()))}; start a server with `aurora serve` or give its --url"
            )

    def look(self) -> None:
        """Ask every server. Raises UserError for one that is not Aurora or wants another key."""
        self._silent, self._present = {}, set()
        states = [self._ask(endpoint) for endpoint in self._endpoints]
        self._state = next((state for state in states if state != "serving"), "serving")
        if self._looks:
            self._remember()

    def _ask(self, endpoint: Endpoint) -> str:
        """Take one server's page; returns what it says of itself."""
        name = urlsplit(endpoint.root).netloc if len(self._endpoints) > 1 else ""
        try:
            samples = parse_samples(endpoint.page("/metrics"))
        except NoAnswer as error:
            self._silent[name or endpoint.root] = str(error)
            return "no answer"
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{endpoint.root}/metrics is no metrics page; give the --url of an Aurora server"
            ) from error
        check_aurora(samples, endpoint.root)
        for look in split_replicas(Look(self._clock(), samples)):
            replica = "/".join(filter(None, (name, look.replica)))
            self._present.add(replica)
            looks = self._looks.setdefault(replica, deque())
            looks.append(Look(look.time_s, look.samples, replica))
            while len(looks) > 2 and looks[-1].time_s - looks[1].time_s >= _WINDOW_S:
                looks.popleft()
        return "serving" if endpoint.answers("/ready") else "not ready"

    def _histories(self) -> list[list[Look]]:
        """The looks at every replica that answered last; when none did, the last one at each, which tells no rates."""
        if not self._present:
            return [[looks[-1]] for _, looks in sorted(self._looks.items())]
        return [list(self._looks[replica]) for replica in sorted(self._present)]

    def _remember(self) -> None:
        whole = status(self._histories())
        lengths = [latest_acceptance(looks) for looks in self._histories()]
        known = [length for length in lengths if length is not None]
        self._speeds.append(whole.tokens_per_s)
        self._acceptance.append(sum(known) / len(known) if known else None)
        if 0 <= self._swaps < whole.versions.swaps:
            self._swapped_s = self._clock()
        self._swaps = whole.versions.swaps

    def frame(self, title: str) -> Frame:
        """The picture of what was seen so far."""
        histories, now_s = self._histories(), self._clock()
        spans = [looks[-1].time_s - looks[0].time_s for looks in histories]
        return Frame(
            title=title,
            state=self._state,
            clock=time.strftime("%H:%M:%S"),
            whole=status(histories),
            replicas=[status([looks]) for looks in histories] if len(histories) > 1 else (),
            silent=self._silent,
            window_s=max(spans),
            speeds=list(self._speeds),
            acceptance=list(self._acceptance),
            store=self._versions(),
            now_s=time.time(),
            swapped_s=now_s - self._swapped_s if self._swapped_s is not None else None,
        )

    def _versions(self) -> list[VersionRecord] | None:
        try:
            return records(self._store) if self._store is not None else None
        except OSError:  # the run directory went away
            return []
