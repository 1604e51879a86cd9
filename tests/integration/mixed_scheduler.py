"""A scheduler for tests that draws on all drafters at once, however well they do."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aurora.config import SpeculationConfig
from aurora.controller import UNKNOWN, Ahead, Draft, Plan, RequestView
from aurora.goodput import MODEL
from serve.portfolio import Drafts, Portfolio
from serve.scheduler import AuroraScheduler


class MixedPortfolio(Portfolio):
    """Each request verifies all that one drafter drafted: its name decides which."""

    def plan(self, batch: list[RequestView], ahead: Ahead = UNKNOWN) -> Plan:
        plan = super().plan(batch, ahead)
        if self.controller.model:
            mine = (v.request_id for v in batch if v.drafting and self._drafter(v.request_id) == MODEL)
            self._plan = replace(plan, model_cap=self._k_max, model_for=frozenset(mine))
        return self._plan

    def settle(self, *args: Any) -> Mapping[str, Drafts]:
        settled = super().settle(*args)
        self._drafts = {r: self._mixed(r, drafts) for r, drafts in settled.items()}
        return self._drafts

    def _drafter(self, request_id: str) -> int:
        return zlib.crc32(request_id.encode()) % (3 if self.controller.model else 2)

    def _mixed(self, request_id: str, drafts: Drafts) -> Drafts:
        drafter = self._drafter(request_id)
        return replace(drafts, chosen=Draft(drafter, len(drafts.by(drafter))))


class MixedScheduler(AuroraScheduler):
    """Aurora's scheduler with a `MixedPortfolio`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        speculation = SpeculationConfig.model_validate(self.vllm_config.additional_config["aurora"])
        self.portfolio = MixedPortfolio(speculation, self.num_spec_tokens)
        self.controller = self.portfolio.controller
