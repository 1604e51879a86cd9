"""Drafters: small models that propose tokens for a target to verify. One file and one registry line a kind."""

from drafters.config import Eagle3Config
from drafters.eagle3 import Eagle3
from drafters.files import check_directory, load_drafter, save_drafter
from drafters.initialise import ensure_drafter, initialise
from drafters.target import TargetWeights

DRAFTER_KINDS = {"eagle3": Eagle3}

__all__ = [
    "DRAFTER_KINDS",
    "Eagle3",
    "Eagle3Config",
    "TargetWeights",
    "check_directory",
    "ensure_drafter",
    "initialise",
    "load_drafter",
    "save_drafter",
]
