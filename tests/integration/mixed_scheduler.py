"""A scheduler for tests that draws on both drafters at once, however well they do."""

import zlib
from collections.abc import Mapping

from aurora.controller import Draft
from aurora.goodput import NEURAL, TABLE
from serve.portfolio import Drafts
from serve.scheduler import AuroraScheduler


class MixedScheduler(AuroraScheduler):
    """Half of the requests verify all that the neural drafter drafted, the others all that the table did."""

    def _settle(self, neural: dict[str, list[int]]) -> Mapping[str, Drafts]:
        self.portfolio._drafts = {r: _mixed(r, drafts) for r, drafts in super()._settle(neural).items()}
        return self.portfolio._drafts


def _mixed(request_id: str, drafts: Drafts) -> Drafts:
    from_table = zlib.crc32(request_id.encode()) % 2
    chosen = Draft(TABLE, len(drafts.table)) if from_table else Draft(NEURAL, len(drafts.neural))
    return Drafts(drafts.neural, drafts.table, chosen)
