"""Drafters: small models that propose tokens for a target to verify. One file and one registry line a kind."""

from drafters.config import Eagle3Config
from drafters.draft_cache import IncrementalDrafter
from drafters.draft_files import ensure_draft_model, initialise_draft_model, load_draft_model, save_draft_model
from drafters.draft_model import DraftModel
from drafters.eagle3 import Eagle3
from drafters.files import check_directory, load_drafter, save_drafter
from drafters.initialise import ensure_drafter, initialise
from drafters.target import TargetWeights

DRAFTER_KINDS = {"eagle3": Eagle3, "model": DraftModel}

__all__ = [
    "DRAFTER_KINDS",
    "DraftModel",
    "Eagle3",
    "Eagle3Config",
    "IncrementalDrafter",
    "TargetWeights",
    "check_directory",
    "ensure_draft_model",
    "ensure_drafter",
    "initialise",
    "initialise_draft_model",
    "load_draft_model",
    "load_drafter",
    "save_draft_model",
    "save_drafter",
]
