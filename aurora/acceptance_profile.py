"""Acceptance profiles: along each recorded answer, how many drafts from each of its places the target would accept.

Speculation is lossless, so this is all that a simulation needs to know of target and drafter: whatever length is chosen
at a place, min(length, right) drafts are accepted and the next place is one token further than that.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aurora.config import UserError

_FORMAT = "aurora-acceptance-profile-1"


@dataclass(frozen=True, eq=False)
class AcceptanceProfile:
    """What one drafter does along a number of recorded answers."""

    drafter: str  # "eagle3", whose drafts cost passes, or "ngram", whose drafts are free until they are verified
    right: npt.NDArray[np.uint8]  # [places] leading drafts that are right, over all answers one after the other
    ends: npt.NDArray[np.int64]  # [answers] place after each answer's last
    expected: npt.NDArray[np.float32]  # [places, k_max] acceptances of each draft that its user would expect

    def __post_init__(self) -> None:
        if self.right.shape != self.expected.shape[:1] or not len(self.ends) or self.ends[-1] != len(self.right):
            raise ValueError(f"{self.right.shape} places, {self.expected.shape} expectations, {self.ends[-1:]} the end")

    @property
    def k_max(self) -> int:
        return int(self.expected.shape[1])

    def rates(self) -> npt.NDArray[np.float64]:
        """P(draft j + 1 is right | the j before it are), over all places, [k_max]; 0 where that never happened."""
        reached = np.array([(self.right >= j).sum() for j in range(self.k_max + 1)], np.float64)
        return np.divide(reached[1:], reached[:-1], out=np.zeros(self.k_max), where=reached[:-1] > 0)

    def hindsight(self) -> npt.NDArray[np.float32]:
        """Acceptances of each draft by the mean of its own answer, [places, k_max]; 0 where none is on offer."""
        begins = np.concatenate([[0], self.ends[:-1]])
        accepted = self.right[:, None] > np.arange(self.k_max)
        offered = np.ones_like(accepted) if self.drafter == "eagle3" else self.expected > 0
        hits, tries = (np.add.reduceat(each.astype(np.float64), begins) for each in (accepted, offered))
        rates = np.divide(hits, tries, out=np.zeros_like(hits), where=tries > 0)
        return np.where(offered, np.repeat(rates, self.ends - begins, axis=0), 0).astype(np.float32)

    def up_to(self, k_max: int) -> "AcceptanceProfile":
        """The same drafter when it drafts `k_max` tokens at most, 1 or more."""
        return AcceptanceProfile(
            self.drafter, np.minimum(self.right, k_max), self.ends, np.ascontiguousarray(self.expected[:, :k_max])
        )

    def write(self, file: Path) -> None:
        from safetensors.numpy import save_file

        save_file(
            {"right": self.right, "ends": self.ends, "expected": self.expected},
            file,
            metadata={"format": _FORMAT, "drafter": self.drafter},
        )


def read_profile(file: Path) -> AcceptanceProfile:
    """Raises UserError for a file that `aurora replay --profile` did not write."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as content:
            metadata = content.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}")
            tensors = {name: content.get_tensor(name) for name in ("right", "ends", "expected")}
        return AcceptanceProfile(metadata["drafter"], **tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"--profile {file}: {error}; give a file that `aurora replay --profile` wrote") from error
