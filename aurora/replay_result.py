"""What a replay found: numbers of each domain, and how soon it recovered from a shift."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from aurora.clockwork import Outcome
from aurora.results import Row, command_line, half_width

_WINDOW = 25  # requests
_MIN_LEG = 10  # requests; where domains take turns faster than that they are mixed
_RECOVERED = 0.95


@dataclass(frozen=True)
class Cell:
    """All requests of one domain, of one leg of it, or of all domains."""

    domain: str  # of a leg with its number: "sql, leg 2"
    requests: int
    acceptance_length: float  # tokens emitted by a verification that has drafts; 1.0 without any
    acceptance_rate: float  # accepted of the drafted tokens; 0.0 without any
    tokens_per_step: float  # of a request's decode steps, those without drafts included
    tokens_per_s: float  # modelled
    speedup: float  # over no speculation, same requests and costs


_NUMBERS = ("acceptance_length", "acceptance_rate", "tokens_per_step", "tokens_per_s", "speedup")
_METRICS = {"speedup": "speedup_over_no_speculation"}


def summarise(outcomes: list[Outcome], plain: list[Outcome]) -> Iterator[Cell]:
    """One cell a domain, in order of appearance, one a leg where domains come back in legs, and one for all ("all")."""
    for name, places in _groups([outcome.domain for outcome in outcomes]).items():
        mine, base = ([group[i] for i in places] for group in (outcomes, plain))
        drafted, draft_steps = sum(o.drafted for o in mine), sum(o.draft_steps for o in mine)
        accepted, speed = sum(o.accepted for o in mine), _tokens_per_s(mine)
        yield Cell(
            domain=name,
            requests=len(mine),
            acceptance_length=1 + accepted / draft_steps if draft_steps else 1.0,
            acceptance_rate=accepted / drafted if drafted else 0.0,
            tokens_per_step=_tokens_per_step(mine),
            tokens_per_s=speed,
            speedup=speed / _tokens_per_s(base),
        )


def _groups(domains: list[str]) -> dict[str, list[int]]:
    """Places of the requests of each cell."""
    groups: dict[str, list[int]] = {domain: [] for domain in domains}
    for i, domain in enumerate(domains):
        groups[domain].append(i)
    stretches = legs(domains)
    if len(stretches) > len(groups) and min(len(places) for _, places in stretches) >= _MIN_LEG:
        counts: Counter[str] = Counter()
        for domain, places in stretches:
            counts[domain] += 1
            groups[f"{domain}, leg {counts[domain]}"] = list(places)
    return groups | {"all": list(range(len(domains)))}


def legs(domains: Sequence[str]) -> list[tuple[str, range]]:
    """Each stretch of one domain, and the places of its requests."""
    found, first = [], 0
    for domain, stretch in groupby(domains):
        end = first + sum(1 for _ in stretch)
        found.append((domain, range(first, end)))
        first = end
    return found


def recovery(outcomes: list[Outcome]) -> dict[str, int | None]:
    """Requests to recover at the start of each domain's leg; empty where the domains are not one leg each."""
    stretches = legs([outcome.domain for outcome in outcomes])
    found = {domain: requests_to_recover([outcomes[i] for i in places]) for domain, places in stretches}
    return found if len(found) == len(stretches) else {}


def requests_to_recover(leg: list[Outcome]) -> int | None:
    """Requests of one leg after which `_WINDOW` of them in a row emit as many tokens a step as its last third does.

    "As many" is `_RECOVERED` of it. None for a leg too short to tell.
    """
    if len(leg) < 3 * _WINDOW:
        return None
    goal = _RECOVERED * _tokens_per_step(leg[-len(leg) // 3 :])
    windows = (leg[i : i + _WINDOW] for i in range(len(leg) - _WINDOW + 1))
    return next(i for i, window in enumerate(windows) if _tokens_per_step(window) >= goal)


def mean_cells(trials: Sequence[Sequence[Cell]]) -> list[Cell]:
    """The mean of each cell over trials."""
    return [
        replace(group[0], **{name: float(np.mean([getattr(c, name) for c in group])) for name in _NUMBERS})
        for group in zip(*trials, strict=True)
    ]


def half_widths(trials: Sequence[Sequence[Cell]]) -> list[dict[str, float]]:
    """Half the width of each number's 95 % confidence interval (Student's t over trials); empty for a single trial."""
    return [
        {name: half_width([getattr(cell, name) for cell in group]) for name in _NUMBERS} if len(trials) > 1 else {}
        for group in zip(*trials, strict=True)
    ]


def rows(
    experiment: str,
    policy: str,
    trials: Sequence[Sequence[Cell]],
    recoveries: Sequence[Mapping[str, int | None]],
    known: Iterable[Row],
) -> Iterator[Row]:
    """All numbers of the trials of one replay: means, and for several trials the half-widths of 95 % intervals.

    Those against the static drafter are there where `known` holds its replay.
    """
    static = {
        row.cell: row.value
        for row in known
        if (row.experiment, row.policy, row.metric) == (experiment, "static_eagle3", "tokens_per_s")
    }
    for cell, width in zip(mean_cells(trials), half_widths(trials), strict=True):
        plain = cell.tokens_per_s / cell.speedup
        found: dict[str, tuple[float, float | None]] = {
            "acceptance_length": (cell.acceptance_length, None),
            "acceptance_rate": (cell.acceptance_rate, None),
            "tokens_per_step": (cell.tokens_per_step, 1.0),
            "tokens_per_s": (cell.tokens_per_s, plain),
            "speedup_over_no_speculation": (cell.speedup, plain),
        }
        if cell.domain in static:
            found["speedup_over_static"] = (cell.tokens_per_s / static[cell.domain], static[cell.domain])
        requests = [n for each in recoveries if (n := each.get(cell.domain)) is not None]
        if len(requests) == len(recoveries):
            found["requests_to_recover"] = (float(np.mean(requests)), None)
        found |= {f"{_METRICS.get(name, name)}_ci95": (half, None) for name, half in width.items()}
        for metric, (value, baseline) in found.items():
            yield Row(experiment, cell.domain, policy, metric, value, baseline, command_line())


def _tokens_per_step(outcomes: list[Outcome]) -> float:
    return 1 + sum(o.accepted for o in outcomes) / max(sum(o.steps for o in outcomes), 1)


def _tokens_per_s(outcomes: list[Outcome]) -> float:
    return sum(o.emitted for o in outcomes) / sum(o.seconds for o in outcomes)
