"""The drafters of one engine, and what each request drafts with: controller and n-gram tables put together.

It knows requests and tokens, no engine: the scheduler drives it with live steps, `aurora replay` with recorded ones.
Order of calls in a step: `begin` for requests that are new, `plan` before it runs, `observe` with what it emitted,
`settle` with what neural drafter and draft model drafted at its end; `finish` when a request is over.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aurora.confidence import cells_of
from aurora.config import SpeculationConfig
from aurora.controller import UNKNOWN, Ahead, Draft, Offer, Plan, RequestView, SpeculationController
from aurora.goodput import MODEL, NEURAL, TABLE, compile_kernels
from drafters.ngram import Tokens
from drafters.served_text import ServedText
from serve.domains import Domains


@dataclass(frozen=True)
class Drafts:
    """What was drafted for one request after a step, and what of it is verified in the next."""

    neural: list[int]
    table: list[int]
    cells: list[int]  # what the table's drafts rest on (`aurora.confidence`)
    chosen: Draft
    model: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """The drafts to verify."""
        return self.by(self.chosen.drafter)[: self.chosen.length] if self.chosen.length else []

    def by(self, drafter: int) -> list[int]:
        """All that one drafter drafted."""
        return self.table if drafter == TABLE else self.model if drafter == MODEL else self.neural


class Portfolio:
    """Neural drafter, n-gram table, draft model, and the choice between them for each request and step."""

    def __init__(self, config: SpeculationConfig, k_max: int) -> None:
        self.controller = SpeculationController(
            k_max=k_max,
            fixed_k=config.fixed_k,
            objective=config.objective,
            exploration=config.exploration,
            neural="eagle3" in config.drafters,
            model="model" in config.drafters,
        )
        compile_kernels(latency=config.objective == "latency")
        self._k_max = k_max
        self._isolate = config.isolate_tenants
        self._text = ServedText(config.ngram_mib << 20) if "ngram" in config.drafters else None
        self._drafts: dict[str, Drafts] = {}  # of the step at hand
        self._plan = Plan(0, skip_drafter=True)
        self._first_drafts = {drafter: [0, 0] for drafter in (NEURAL, MODEL)}
        self._domains = Domains(cluster=config.cluster_domains)
        self._domain_of: dict[str, str] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._domain_of

    def begin(self, request_id: str, tenant: str, label: str, prompt: Sequence[int] | Tokens, room: int) -> str:
        """Follow a new request whose answer has at most `room` tokens; returns the domain that it is of.

        label: the domain that its user named, or "". Labels keep tables and statistics apart, clusters statistics only:
        a cluster's table is too often empty where that of all unlabelled requests knows how to go on.
        """
        tokens = np.fromiter(prompt, np.int32, len(prompt))
        domain = self._domain_of[request_id] = self._domains.of(label, tokens)
        if self._text is not None:
            group = (tenant if self._isolate else "", domain if label else "")
            self._text.begin(request_id, group, tokens, room)
        return domain

    def domain_of(self, request_id: str) -> str:
        """The domain of a followed request."""
        return self._domain_of[request_id]

    def plan(self, batch: list[RequestView], ahead: Ahead = UNKNOWN) -> Plan:
        """What the neural drafter does at the end of the step that is about to run."""
        self._plan = self.controller.plan(batch, ahead)
        return self._plan

    @property
    def one_hot(self) -> dict[str, int]:
        """Requests whose drafts, to be verified in the next step, are the table's or the draft model's: which of them.

        Both draft greedily, so all of q lies on the drafted token.
        """
        drafters = {r: drafts.chosen.drafter for r, drafts in self._drafts.items()}
        return {r: drafter for r, drafter in drafters.items() if drafter != NEURAL}

    def drafter_of(self, request_id: str) -> int:
        """NEURAL, TABLE or MODEL: whose drafts the request verifies in the step at hand, if it verifies any."""
        drafts = self._drafts.get(request_id)
        return NEURAL if drafts is None else drafts.chosen.drafter

    def observe(self, request_id: str, verified: int, emitted: list[int]) -> None:
        """The target said `emitted` after verifying `verified` drafts: every draft shows how good it was.

        Of a draft that was not verified only the first token is compared: what followed was seen only because another
        drafter was right, which says that the text was easy.
        """
        if not emitted:
            return
        drafts = self._drafts.get(request_id)
        if drafts is not None:
            self._compare(request_id, drafts, verified, emitted)
        if self._text is not None and request_id in self._text:
            self._text.extend(request_id, emitted)

    def _compare(self, request_id: str, drafts: Drafts, verified: int, emitted: list[int]) -> None:
        """Tell the controller how good each drafter's drafts were."""
        for drafter in (NEURAL, TABLE, MODEL):
            tokens = drafts.by(drafter)[: max(verified, 1) if drafts.chosen.drafter == drafter else 1]
            if not tokens:
                continue
            right = _agreement(tokens, emitted)
            if drafter == TABLE:
                self.controller.observe_table(request_id, drafts.cells, len(tokens), right)
                continue
            observe = self.controller.observe_neural if drafter == NEURAL else self.controller.observe_model
            observe(request_id, len(tokens), right)
            self._first_drafts[drafter][0] += 1
            self._first_drafts[drafter][1] += right > 0

    def take_first_drafts(self, drafter: int = NEURAL) -> tuple[int, int]:
        """Drafts of NEURAL or MODEL since the last call, and how many of them had the right first token."""
        drafts, right = self._first_drafts[drafter]
        self._first_drafts[drafter] = [0, 0]
        return drafts, right

    def settle(
        self,
        neural: Mapping[str, list[int]],
        limits: Mapping[str, int],
        model: Mapping[str, list[int]] | None = None,
        ahead: Ahead = UNKNOWN,
    ) -> Mapping[str, Drafts]:
        """Choose among the drafts of the requests that emitted a token and go on.

        neural: what the neural drafter drafted; of no use for cold requests. limits: longest draft each may have now.
        model: what the draft model drafted, for some of them.
        """
        drafted = {r: (model or {}).get(r, []) for r in neural}
        warm = {r: [] if self.controller.is_cold(r) else tokens for r, tokens in neural.items()}
        table = self._propose(neural)
        offers = {r: Offer(limits[r], len(tokens), table[r][1], len(drafted[r])) for r, tokens in warm.items()}
        chosen = self.controller.settle(self._plan, offers, ahead)
        self._drafts = {r: Drafts(warm[r], *table[r], draft, drafted[r]) for r, draft in chosen.items()}
        return self._drafts

    def finish(self, request_ids: Iterable[str]) -> None:
        """Requests are over: their answers may be drafted for others, all else is forgotten."""
        for request_id in request_ids:
            self.controller.finish([request_id])
            self._drafts.pop(request_id, None)
            self._domain_of.pop(request_id, None)
            if self._text is not None and request_id in self._text:
                self._text.finish(request_id)

    def _propose(self, request_ids: Iterable[str]) -> dict[str, tuple[list[int], list[int]]]:
        """What the table drafts for each, and the cells of it."""
        nothing: dict[str, tuple[list[int], list[int]]] = dict.fromkeys(request_ids, ([], []))
        if self._text is None:
            return nothing
        known = [r for r in request_ids if r in self._text]
        proposals = self._text.propose(known, self._k_max)
        rows = zip(known, proposals.tokens, cells_of(proposals.basis), strict=True)
        return nothing | {r: (tokens, cells[: len(tokens)]) for r, tokens, cells in rows}


def _agreement(drafts: list[int], emitted: list[int]) -> int:
    """Leading drafts that equal what was emitted."""
    pairs = zip(drafts, emitted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drafts), len(emitted)))
