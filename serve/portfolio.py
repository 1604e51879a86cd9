"""The drafters of one engine, and what each request drafts with: controller and n-gram tables put together.

It knows requests and tokens, no engine: the scheduler drives it with live steps, `aurora replay` with recorded ones.
Order of calls in a step: `begin` for requests that are new, `plan` before it runs, `observe` with what it emitted,
`settle` with what the neural drafter drafted at its end; `finish` when a request is over.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aurora.config import SpeculationConfig
from aurora.controller import Draft, Offer, Plan, RequestView, SpeculationController
from aurora.goodput import NEURAL, TABLE
from drafters.ngram import NO_PROPOSAL, Proposal, Tokens
from drafters.served_text import ServedText
from serve.domains import Domains


@dataclass(frozen=True)
class Drafts:
    """What was drafted for one request after a step, and what of it is verified in the next."""

    neural: list[int]
    table: Proposal
    chosen: Draft

    @property
    def tokens(self) -> list[int]:
        """The drafts to verify."""
        tokens = self.table.tokens.tolist() if self.chosen.drafter == TABLE else self.neural
        return tokens[: self.chosen.length]


class Portfolio:
    """Neural drafter, n-gram table, and the choice between them for each request and step."""

    def __init__(self, config: SpeculationConfig, k_max: int) -> None:
        self.controller = SpeculationController(
            k_max=k_max,
            fixed_k=config.fixed_k,
            exploration=config.exploration,
            neural="eagle3" in config.drafters,
        )
        self._k_max = k_max
        self._isolate = config.isolate_tenants
        self._text = ServedText(config.ngram_mib << 20) if "ngram" in config.drafters else None
        self._drafts: dict[str, Drafts] = {}  # of the step at hand
        self._plan = Plan(0, skip_drafter=True)
        self._neural_drafts = self._right_first = 0
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

    def plan(self, batch: list[RequestView]) -> Plan:
        """What the neural drafter does at the end of the step that is about to run."""
        self._plan = self.controller.plan(batch)
        return self._plan

    @property
    def from_table(self) -> frozenset[str]:
        """Requests whose drafts, to be verified in the next step, are the table's."""
        return frozenset(r for r, drafts in self._drafts.items() if drafts.chosen.drafter == TABLE)

    def observe(self, request_id: str, verified: int, emitted: list[int]) -> None:
        """The target said `emitted` after verifying `verified` drafts: every draft shows how good it was.

        Of a draft that was not verified only the first token is compared: what followed was seen only because another
        drafter was right, which says that the text was easy.
        """
        if not emitted:
            return
        drafts = self._drafts.get(request_id)
        if drafts is not None:
            known = {d: max(verified, 1) if drafts.chosen.drafter == d else 1 for d in (NEURAL, TABLE)}
            neural, table = drafts.neural[: known[NEURAL]], drafts.table.tokens[: known[TABLE]].tolist()
            right = _agreement(neural, emitted)
            self.controller.observe_neural(request_id, len(neural), right)
            self.controller.observe_table(request_id, drafts.table.basis, len(table), _agreement(table, emitted))
            self._neural_drafts += bool(neural)
            self._right_first += right > 0
        if self._text is not None and request_id in self._text:
            self._text.extend(request_id, emitted)

    def take_first_drafts(self) -> tuple[int, int]:
        """Neural drafts since the last call, and how many of them had the right first token."""
        counted = self._neural_drafts, self._right_first
        self._neural_drafts = self._right_first = 0
        return counted

    def settle(self, neural: Mapping[str, list[int]], limits: Mapping[str, int]) -> Mapping[str, Drafts]:
        """Choose among the drafts of the requests that emitted a token and go on.

        neural: what the neural drafter drafted; of no use for cold requests. limits: longest draft each may have now.
        """
        warm = {r: [] if self.controller.is_cold(r) else tokens for r, tokens in neural.items()}
        table = {r: self._propose(r) for r in neural}
        offers = {r: Offer(limits[r], len(tokens), table[r].basis) for r, tokens in warm.items()}
        chosen = self.controller.settle(self._plan, offers)
        self._drafts = {r: Drafts(warm[r], table[r], draft) for r, draft in chosen.items()}
        return self._drafts

    def finish(self, request_ids: Iterable[str]) -> None:
        """Requests are over: their answers may be drafted for others, all else is forgotten."""
        for request_id in request_ids:
            self.controller.finish([request_id])
            self._drafts.pop(request_id, None)
            self._domain_of.pop(request_id, None)
            if self._text is not None and request_id in self._text:
                self._text.finish(request_id)

    def _propose(self, request_id: str) -> Proposal:
        if self._text is None or request_id not in self._text:
            return NO_PROPOSAL
        return self._text.propose(request_id, self._k_max)


def _agreement(drafts: list[int], emitted: list[int]) -> int:
    """Leading drafts that equal what was emitted."""
    pairs = zip(drafts, emitted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drafts), len(emitted)))
