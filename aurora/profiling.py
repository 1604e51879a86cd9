"""Acceptance profiles of recorded answers: what a drafter drafts from every place of them, and what of it is right."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aurora.acceptance_profile import AcceptanceProfile
from aurora.confidence import ConfidenceModel, cells_of
from aurora.config import UserError

if TYPE_CHECKING:
    from trainer.sequence import Sequence as Recorded

Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]  # right [places], expected [places, k_max]


def profile(
    drafter: str, k_max: int, requests: "Iterable[Recorded]", places: "Callable[[Recorded], Places]"
) -> AcceptanceProfile:
    """The profile of `drafter`, whose `places` are asked for in the order of arrival; too short answers are left out.

    Raises UserError when all are too short.
    """
    found = [places(request) for request in requests if _places(request, k_max)]
    if not found:
        raise UserError(f"--profile: no answer is longer than --k-max {k_max} tokens; lower it, or record longer ones")
    right, expected = (np.concatenate(parts) for parts in zip(*found, strict=True))
    ends = np.cumsum([len(counts) for counts, _ in found])
    return AcceptanceProfile(drafter, right.astype(np.uint8), ends, expected.astype(np.float32))


def neural_places(draft: "Callable[[Recorded], npt.NDArray[np.int64]]", k_max: int) -> "Callable[[Recorded], Places]":
    """Of a neural drafter, by its drafts [starts, k_max] along a request; what to expect of them is learned in use."""
    from trainer.verify import accepted_drafts

    def places(request: "Recorded") -> Places:
        first = request.prompt_tokens - 1 - request.first_start  # row that drafts after the first token of the answer
        right = accepted_drafts(draft(request), request)[first : first + _places(request, k_max)]
        return right, np.zeros((len(right), k_max))

    return places


def table_places(limit_bytes: int, k_max: int) -> "Callable[[Recorded], Places]":
    """Of the table over served text, which learns each answer when it is through."""
    from drafters.served_text import ServedText

    text, confidence = ServedText(limit_bytes), ConfidenceModel()

    def places(request: "Recorded") -> Places:
        name, count = request.request_id, _places(request, k_max)
        prompt, answer = np.split(request.ids, [request.prompt_tokens])
        text.begin(name, ("", request.domain), prompt, len(answer))
        confidence.start(name, request.domain)
        right, expected = np.zeros(count, np.int64), np.zeros((count, k_max))
        for place in range(count):
            text.extend(name, [int(answer[place])])
            proposals = text.propose([name], k_max)
            (tokens,), (cells,) = proposals.tokens, cells_of(proposals.basis)
            rates = confidence.rates(name, cells[: len(tokens)])
            right[place] = np.cumprod(tokens == answer[place + 1 : place + 1 + len(tokens)]).sum()
            expected[place, : len(rates)] = np.cumprod(rates)
            confidence.observe(name, cells, len(rates), int(right[place]))
        text.extend(name, answer[count:].tolist())
        text.finish(name)
        confidence.finish(name)
        return right, expected

    return places


def _places(request: "Recorded", k_max: int) -> int:
    """Places of an answer from which all `k_max` next tokens are known."""
    return max(len(request.ids) - request.prompt_tokens - k_max, 0)
