"""What a replay found: numbers of each domain, and how soon it recovered from a shift."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from aurora.clockwork import Outcome
from aurora.results import Row, command_line

_WINDOW = 25  # requests
_RECOVERED = 0.95


@dataclass(frozen=True)
class Cell:
    """All requests of one domain, or of all of them."""

    domain: str
    requests: int
    acceptance_length: float  # tokens emitted by a verification that has drafts; 1.0 without any
    acceptance_rate: float  # accepted of the drafted tokens; 0.0 without any
    tokens_per_step: float  # of a request's decode steps, those without drafts included
    tokens_per_s: float  # modelled
    speedup: float  # over no speculation, same requests and costs


def summarise(outcomes: list[Outcome], plain: list[Outcome]) -> Iterator[Cell]:
    """One cell a domain, in order of appearance, and one for all (domain "all")."""
    domains = list(dict.fromkeys(outcome.domain for outcome in outcomes))
    for domain in [*domains, "all"]:
        mine, base = ([o for o in group if domain in ("all", o.domain)] for group in (outcomes, plain))
        drafted, draft_steps = sum(o.drafted for o in mine), sum(o.draft_steps for o in mine)
        accepted, speed = sum(o.accepted for o in mine), _tokens_per_s(mine)
        yield Cell(
            domain=domain,
            requests=len(mine),
            acceptance_length=1 + accepted / draft_steps if draft_steps else 1.0,
            acceptance_rate=accepted / drafted if drafted else 0.0,
            tokens_per_step=_tokens_per_step(mine),
            tokens_per_s=speed,
            speedup=speed / _tokens_per_s(base),
        )


def recovery(outcomes: list[Outcome]) -> dict[str, int | None]:
    """Requests to recover at the start of each domain's leg; empty where the domains are not one leg each."""
    legs = [(domain, list(leg)) for domain, leg in groupby(outcomes, lambda outcome: outcome.domain)]
    found = {domain: requests_to_recover(leg) for domain, leg in legs}
    return found if len(found) == len(legs) else {}


def requests_to_recover(leg: list[Outcome]) -> int | None:
    """Requests of one leg after which `_WINDOW` of them in a row emit as many tokens a step as its last third does.

    "As many" is `_RECOVERED` of it. None for a leg too short to tell.
    """
    if len(leg) < 3 * _WINDOW:
        return None
    goal = _RECOVERED * _tokens_per_step(leg[-len(leg) // 3 :])
    windows = (leg[i : i + _WINDOW] for i in range(len(leg) - _WINDOW + 1))
    return next(i for i, window in enumerate(windows) if _tokens_per_step(window) >= goal)


def rows(
    experiment: str, policy: str, cells: Sequence[Cell], recovery: Mapping[str, int | None], known: Iterable[Row]
) -> Iterator[Row]:
    """All numbers of one replay; those against the static drafter where `known` holds its replay."""
    static = {
        row.cell: row.value
        for row in known
        if (row.experiment, row.policy, row.metric) == (experiment, "static_eagle3", "tokens_per_s")
    }
    for cell in cells:
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
        requests = recovery.get(cell.domain)
        if requests is not None:
            found["requests_to_recover"] = (float(requests), None)
        for metric, (value, baseline) in found.items():
            yield Row(experiment, cell.domain, policy, metric, value, baseline, command_line())


def _tokens_per_step(outcomes: list[Outcome]) -> float:
    return 1 + sum(o.accepted for o in outcomes) / max(sum(o.steps for o in outcomes), 1)


def _tokens_per_s(outcomes: list[Outcome]) -> float:
    return sum(o.emitted for o in outcomes) / sum(o.seconds for o in outcomes)
