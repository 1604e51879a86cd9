"""The draft model of one vLLM worker: drafting beside the engine's own drafter, and the exchange of its weights.

vLLM runs one drafter with a model, so this one is run here, on plain torch, after the step's tokens are known. A new
version is read, checked and put together beside the live one (`stage`); `commit` exchanges one reference between two
steps. So a version is in use as a whole or not at all, and nothing that the engine computes with is ever written to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora.store import DrafterStore
from drafters import DraftModel, IncrementalDrafter, TargetWeights, load_draft_model


@dataclass(frozen=True)
class StagedModel:
    """A draft model version, checked and ready."""

    version: int
    gated_rates: list[float]
    model: DraftModel


class DraftModelHost:
    """The live draft model with its caches."""

    def __init__(self, runner: Any, store_root: Path, version: int) -> None:
        """Read the version. Raises DrafterRefused when it does not belong to the runner's target."""
        self._runner = runner
        self._store = DrafterStore(store_root)
        # A copy of its own of embedding and head: the engine packs its weights away.
        self._target = TargetWeights.load(Path(runner.vllm_config.model_config.model), str(runner.device))
        staged = self.stage(version)
        self._drafter = IncrementalDrafter(staged.model)
        self.version, self.gated_rates = staged.version, staged.gated_rates

    def stage(self, number: int) -> StagedModel:
        """Prepare a version. Raises DrafterRefused; the live one is not touched."""
        record = self._store.verify(number)
        rates = [float(rate) for rate in record.metadata.get("gated_rates") or []]
        return StagedModel(number, rates, load_draft_model(record.path, self._target))

    def commit(self, staged: StagedModel) -> None:
        """Draft with `staged` from now on."""
        self._drafter.model = staged.model
        self.version, self.gated_rates = staged.version, staged.gated_rates

    def draft(self, request_ids: Iterable[str], k: int) -> dict[str, list[int]]:
        """`k` tokens for each of the requests that are in the runner's batch, after all that they have said."""
        self._drafter.retain(self._runner.requests)
        batch = self._runner.input_batch
        places = {r: batch.req_id_to_index[r] for r in request_ids if r in batch.req_id_to_index}
        texts = {r: batch.token_ids_cpu[i, : int(batch.num_tokens_no_spec[i])] for r, i in places.items()}
        return self._drafter.draft(texts, k).tokens
