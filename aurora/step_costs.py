"""Step costs that a live engine measured, from a file that `aurora bench --json` wrote."""

import json
from pathlib import Path

from aurora.config import UserError
from aurora.step_time import MODEL_COSTS, StepTimeModel


def read_costs(file: Path, draft_model: bool = False) -> StepTimeModel:
    """The step-time model that `aurora bench --json` measured; `draft_model`: those of the draft model are needed.

    Raises UserError for a file that lacks them.
    """
    try:
        costs = json.loads(file.read_text())["step_costs"]
        model = StepTimeModel.known(costs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: {error!r}; give a file that `aurora bench --json` wrote") from error
    missing = [name for name in MODEL_COSTS if name not in costs]
    if draft_model and missing:
        raise UserError(
            f"{file}: no cost of {missing[0]}; add it from aurora_step_cost_seconds of a server with that drafter"
        )
    return model
