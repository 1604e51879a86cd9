"""The domain of each request: the label that its user gave it, or else the cluster of its prompt, or else none ("").

Domains are the groups of which statistics are kept apart. Their number is bounded: labels come from users, and those
beyond the bound share the domain "" with the requests of which nobody knows anything. No label can name a cluster: one
that looks as if it did is kept under another name.
"""

import numpy as np
import numpy.typing as npt

from aurora.clusters import PromptClusters

MAX_LABEL = 64  # characters
_MAX_LABELS = 64
_CLUSTER, _ESCAPE = "cluster-", "label:"


class Domains:
    """Names the domains of one engine's requests."""

    def __init__(self, *, cluster: bool) -> None:
        """cluster: whether requests without a label belong to clusters, or to the domain ""."""
        self._labels: set[str] = set()
        self._clusters = PromptClusters() if cluster else None

    def of(self, label: str, prompt: npt.NDArray[np.int32]) -> str:
        """The domain of a request with this label, "" for none; clusters learn from prompts without a label."""
        if label:
            return self._of_label(label)
        cluster = self._clusters.assign(prompt) if self._clusters is not None else None
        return "" if cluster is None else f"{_CLUSTER}{cluster}"

    def _of_label(self, label: str) -> str:
        if label not in self._labels and (len(self._labels) >= _MAX_LABELS or len(label) > MAX_LABEL):
            return ""
        self._labels.add(label)
        return f"{_ESCAPE}{label}" if label.startswith((_CLUSTER, _ESCAPE)) else label
