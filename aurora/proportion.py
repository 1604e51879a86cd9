"""A share of trials that succeeded, estimated with one trial of each outcome added (Agresti & Caffo 2000)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Proportion:
    """Trials, and how many of them were right; both may have faded, so they need not be whole."""

    trials: float = 0.0
    right: float = 0.0

    def __add__(self, other: "Proportion") -> "Proportion":
        return Proportion(self.trials + other.trials, self.right + other.right)

    def faded(self, keep: float) -> "Proportion":
        """With `keep` of its weight, from 0 to 1."""
        return Proportion(keep * self.trials, keep * self.right)

    @property
    def rate(self) -> float:
        return (self.right + 1) / (self.trials + 2)

    @property
    def variance(self) -> float:
        """Of `rate`, for independent trials."""
        return self.rate * (1 - self.rate) / (self.trials + 2)
