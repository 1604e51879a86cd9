"""A server's status on a terminal: whole at 80x24, with more beside each other on wider ones.

What is drawn is decided here and nowhere else; the numbers come from `aurora.status`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from aurora.drafter_records import IS_REJECTED, VersionRecord
from aurora.status import Status
from aurora.terminal_text import ASCII_BLOCKS, BLOCKS, age, counted, number, percent, sparkline

_LABEL = 9  # columns of the names in front of values
_LINES = 4  # of each section
_WIDE = 120  # columns from which on three sections stand beside each other
Section = tuple[str, list[Text]]


@dataclass(frozen=True)
class Frame:
    """One picture: `title` and `state` are said of the servers, the series are oldest first."""

    title: str
    state: str  # serving, draining, or why there is no answer
    clock: str
    whole: Status
    replicas: Sequence[Status] = ()  # several, or none
    silent: Mapping[str, str] = field(default_factory=dict)  # replicas that do not answer -> why
    window_s: float = 0.0  # that mixes and acceptance are of
    speeds: Sequence[float | None] = ()
    acceptance: Sequence[float | None] = ()
    store: Sequence[VersionRecord] | None = None  # None: no run directory was given
    now_s: float = 0.0  # wall-clock time
    swapped_s: float | None = None  # seconds since the last swap that was seen
    height: int | None = None  # rows; None: as many as it takes

    @property
    def well(self) -> bool:
        """Whether everything answers and nothing is wrong."""
        return self.state == "serving" and not self.silent and not self.whole.alarms

    def fitted(self, height: int) -> "Frame":
        """The same for a screen of that many rows."""
        return replace(self, height=height)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, blocks = options.max_width, ASCII_BLOCKS if options.ascii_only else BLOCKS
        columns = 3 if width >= _WIDE else 2
        yield _header(self, width)
        cell = (width - 2 * (columns - 1)) // columns
        sections = list(_sections(self, cell, blocks))
        for at in range(0, len(sections), columns):
            yield _side_by_side(sections[at : at + columns], cell, width - (columns - 1) * (cell + 2))
        used = 1 + -(-len(sections) // columns) * (_LINES + 1)
        alarms = _alarms(self)
        yield _heading("Alarms")
        yield from alarms
        if self.replicas or self.silent:
            room = None if self.height is None else self.height - used - 1 - len(alarms) - 2
            yield _heading("Replicas")
            yield _replicas(self, room)


def _heading(title: str) -> Rule:
    return Rule(Text(title, "bold"), align="left", style="dim")


def _side_by_side(sections: Sequence[Section], width: int, last: int) -> Table:
    """Each `width` wide but the last one, which ends where the screen does."""
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for i in range(len(sections)):
        grid.add_column(width=last if i == len(sections) - 1 else width, no_wrap=True, overflow="ellipsis")
    grid.add_row(*(_heading(title) for title, _ in sections))
    for row in zip_longest(*(lines[:_LINES] for _, lines in sections), fillvalue=Text()):
        grid.add_row(*row)
    return grid


def _header(frame: Frame, width: int) -> Text:
    right = Text.assemble((frame.state, "green" if frame.state == "serving" else "bold red"), f"  {frame.clock}")
    right.truncate(width - 20, overflow="ellipsis")
    model = frame.whole.model.rstrip("/").rpartition("/")[2]
    left = Text.assemble(("aurora", "bold"), f"  {frame.title}", f"  {model}" if model else "")
    left.truncate(width - len(right) - 2, overflow="ellipsis", pad=True)
    return Text.assemble(left, "  ", right)


def _sections(frame: Frame, width: int, blocks: str) -> Iterator[Section]:
    room = width - _LABEL
    since = f"last {frame.window_s:.0f} s" if frame.whole.recent else "since the start"
    yield "Speed", _speed(frame, room, blocks)
    yield f"Acceptance, {since}", _acceptance(frame, room, blocks)
    yield f"Speculation length, {since}", _lengths(frame.whole.k_mix, blocks)
    yield f"Drafters, {since}", _mix(frame.whole.drafter_mix, room, blocks)
    yield "Versions", _versions(frame, room)
    yield "Trainer", _training(frame.whole)


def _line(label: str, *parts: str | tuple[str, str] | Text) -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", "dim"), *parts)


def _speed(frame: Frame, room: int, blocks: str) -> list[Text]:
    s = frame.whole
    emitted = f"{number(s.tokens_per_s)} tok/s "
    drawn = sparkline(frame.speeds, room - len(emitted), blocks, low=0.0)
    predicted = f", predicted {number(s.predicted_goodput)}" if s.predicted_goodput else " tok/s"
    return [
        _line("emitted", (emitted, "bold"), (drawn, "cyan")),
        _line("goodput", f"{number(s.goodput)}{predicted}"),
        _line("prompts", f"{number(s.prompt_tokens_per_s)} tok/s, busy {percent(s.busy)}"),
        _line("requests", f"{counted(s.running)} + {counted(s.waiting)} wait, KV {percent(s.kv_cache)}"),
    ]


def _acceptance(frame: Frame, room: int, blocks: str) -> list[Text]:
    s = frame.whole
    length = "-" if s.acceptance_length is None else f"{s.acceptance_length:.2f}"
    drawn = sparkline(frame.acceptance, room - len(length) - 1, blocks, low=1.0)
    shown = " ".join(f"{100 * rate:.0f}" for rate in s.acceptance_by_position[:4])
    bars = max(room - len(shown) - 3, 0)
    places = sparkline(s.acceptance_by_position[:bars], bars, blocks, low=0.0, high=1.0)
    per_step = "-" if s.tokens_per_step is None else f"{s.tokens_per_step:.2f} tokens a request"
    error = f"{percent(s.step_time_error)} off (median)" if s.step_time_error else "-"
    return [
        _line("length", (length, "bold"), " ", (drawn, "cyan")),
        _line("by place", f"{shown} % " if shown else "-", (places, "cyan")),
        _line("per step", per_step),
        _line("step time", f" {error}"),
    ]


def _lengths(mix: Mapping[int, float], blocks: str) -> list[Text]:
    if not mix:
        return [_line("k", "no decode step yet")]
    ks = range(max(mix) + 1)
    cell = 4 if len(ks) <= 7 else 2 if len(ks) <= 14 else 1
    shares = [mix.get(k, 0.0) for k in ks]
    labels = "".join(f"{k if cell == 4 else k % 10:>{cell}}" for k in ks)
    bars = "".join(f"{block:>{cell}}" for block in sparkline(shares, len(shares), blocks, low=0.0, high=1.0))
    lines = [_line("k", labels), _line("", (bars, "cyan"))]
    if cell == 4:
        lines.append(_line("%", "".join(f"{100 * share:>{cell}.0f}" for share in shares)))
    return [*lines, _line("mean", f"{sum(k * s for k, s in zip(ks, shares, strict=True)):.2f}")]


def _mix(mix: Mapping[str, float], room: int, blocks: str) -> list[Text]:
    if not mix:
        return [_line("none", "no decode step yet")]
    bar = room - 6
    return [
        _line(name, (f"{blocks[-1] * round(share * bar):<{bar}}", "cyan"), f"{percent(share):>6}")
        for name, share in mix.items()
    ]


def _versions(frame: Frame, room: int) -> list[Text]:
    v = frame.whole.versions
    live = "none" if v.live is None else f"{v.live}"
    model = f", model {v.draft_model}" if v.draft_model is not None else ""
    swaps = f"{v.swaps:,}"
    if frame.swapped_s is not None:
        swaps += f", {age(frame.swapped_s)} ago"
    if v.last_stall_s is not None and len(swaps) + len(stall := f", stall {v.last_stall_s:.3f} s") <= room:
        swaps += stall
    undone = f"{v.rollbacks:,} rolled back, {v.swap_failures:,} refused"
    return [
        _line("live", (live, "bold"), _age_of(frame, v.live), model),
        _newest(frame, room),
        _line("swaps", swaps),
        _line("undone", (undone, "yellow" if v.rollbacks or v.swap_failures else "")),
    ]


def _age_of(frame: Frame, number: int | None) -> str:
    found = [record for record in frame.store or () if record.number == number]
    return f", {age(frame.now_s - found[0].published_s)} old" if found else ""


def _newest(frame: Frame, room: int) -> Text:
    if frame.store is None:
        return _line("newest", ("--run-dir shows the store", "dim"))
    if not frame.store:
        return _line("newest", "none")
    newest = frame.store[-1]
    if newest.state == IS_REJECTED:
        text = Text(f"{newest.number} rejected: {newest.reason}", "yellow")
        text.truncate(room, overflow="ellipsis")
        return _line("newest", text)
    gate = f", gate {newest.gate_acceptance:.2f}" if newest.gate_acceptance is not None else ""
    return _line("newest", f"{newest.number}{gate}, {age(frame.now_s - newest.published_s)} ago")


def _training(s: Status) -> list[Text]:
    t = s.training
    state = {True: ("alive", "green"), False: ("does not answer", "bold red"), None: ("no trace yet", "dim")}[t.alive]
    share = f", computes {percent(t.share)}" if t.alive else ""
    lost = t.dropped or t.unlogged
    behind = "-" if t.staleness is None else f"{t.staleness:.2f} versions behind"
    return [
        _line("state", state, share, (", drift", "yellow") if t.drift else ""),
        _line("traces", f"{number(t.traces_per_s)}/s, {t.traces_waiting:,} waiting"),
        _line("dropped", (f"{t.dropped:,} + {t.unlogged:,} unlogged", "yellow" if lost else "")),
        _line("drafts", behind),
    ]


def _alarms(frame: Frame) -> list[Text]:
    lines = [Text(f"{name} does not answer: {why}", "bold red") for name, why in frame.silent.items()]
    lines += [Text(alarm, "bold red") for alarm in frame.whole.alarms]
    if frame.whole.restarted:
        lines.append(Text("a server began anew since the last look", "yellow"))
    if frame.whole.refused:
        lines.append(Text(f"{frame.whole.refused:,} requests were refused (503) since the start", "yellow"))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return lines or [Text("none", "green")]


def _replicas(frame: Frame, room: int | None) -> Table:
    """One row each; those beyond `room` rows are counted in the last one."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True, overflow="ellipsis")
    for name in ("tok/s", "goodput", "length", "mean k", "live", "running", "waiting", "trainer"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = list(frame.replicas)
    shown = rows if room is None or len(rows) <= room else rows[: max(room - 1, 0)]
    for s in shown:
        k = sum(k * share for k, share in s.k_mix.items())
        length = "-" if s.acceptance_length is None else f"{s.acceptance_length:.2f}"
        alive = {True: "alive", False: "silent", None: "-"}[s.training.alive]
        speeds = number(s.tokens_per_s), number(s.goodput), length, f"{k:.2f}"
        table.add_row(
            Text(s.replicas[0]), *speeds, counted(s.versions.live), counted(s.running), counted(s.waiting), alive
        )
    if len(shown) < len(rows):
        table.add_row(f"{len(rows) - len(shown)} more")
    return table


def one_line(frame: Frame) -> str:
    """The same in one line, for logs and pipes."""
    s = frame.whole
    k = sum(k * share for k, share in s.k_mix.items())
    mix = " ".join(f"{name} {percent(share)}" for name, share in s.drafter_mix.items() if share)
    length = "-" if s.acceptance_length is None else f"{s.acceptance_length:.2f}"
    alive = {True: "alive", False: "silent", None: "-"}[s.training.alive]
    parts = (
        frame.clock,
        frame.state,
        f"{number(s.tokens_per_s)} tok/s",
        f"goodput {number(s.goodput)} (predicted {number(s.predicted_goodput)})",
        f"acceptance {length}",
        f"k {k:.2f}",
        mix,
        f"version {counted(s.versions.live)}",
        f"trainer {alive}",
        "; ".join(["ALARM", *frame.silent, *s.alarms]) if s.alarms or frame.silent else "",
    )
    return " | ".join(part for part in parts if part)
