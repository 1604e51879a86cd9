"""Numbers, shares, time spans and small graphs as people read them on a terminal. Pure."""

from collections.abc import Sequence

BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#%"


def sparkline(
    values: Sequence[float | None], width: int, blocks: str = BLOCKS, *, low: float, high: float | None = None
) -> str:
    """The newest `width` values as blocks between `low` and `high` (default: the largest); unknown ones are blank."""
    shown = list(values)[-width:] if width > 0 else []
    top = max((v for v in shown if v is not None), default=low) if high is None else high
    return "".join(" " if v is None else blocks[_level(v, low, top, len(blocks) - 1)] for v in shown)


def _level(value: float, low: float, high: float, levels: int) -> int:
    """1 .. levels, so that a known value is never blank; 0 only for what is exactly nothing."""
    if value <= low or high <= low:
        return 1
    return max(1, min(levels, round((value - low) / (high - low) * levels)))


def number(value: float | None) -> str:
    """For people: one decimal below 100, thousands separated; "-" for what is not known."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def counted(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def age(seconds: float) -> str:
    """A time span for people: 5 s, 12 min, 3.4 h, 2.1 d."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 6000)):
        if seconds < limit:
            return f"{max(seconds, 0) / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} d"
