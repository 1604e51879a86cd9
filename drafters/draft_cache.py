"""Incremental drafting with a draft model: what it drafts for a text never depends on what it read before.

Each request has a cache of keys and values beside the tokens they stand for. Drafting compares those tokens with the
request's text: from the first difference on the cache is cut off (drafts that the target rejected, a request that was
computed again), then what is missing is read, for all requests in one pass.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafters.draft_model import Attend, DraftModel, attention

Tokens = npt.NDArray[np.integer]
_ROOM = 256  # positions that a cache grows by at least


class _Cache:
    """The tokens that were read of one request, [length], with their keys and values in every layer."""

    def __init__(self, model: DraftModel) -> None:
        config = model.config
        shape = (config.num_hidden_layers, 2, 0, config.num_key_value_heads, config.head_dim)
        self._states = torch.empty(shape, device=model.embed_tokens.device)  # [layers, 2, room, KV, D]
        self._ids = np.empty(0, np.int64)
        self.length = 0

    def keep_prefix_of(self, text: Tokens) -> Tokens:
        """Cut off what `text` does not begin with, and its last token; returns the rest of `text`, never empty."""
        most = min(self.length, len(text) - 1)
        differs = np.flatnonzero(self._ids[:most] != text[:most])
        self.length = int(differs[0]) if len(differs) else most
        return text[self.length :]

    def expect(self, ids: Tokens) -> None:
        """Make room for `ids`, whose states follow in every layer; they count as read at once."""
        end = self.length + len(ids)
        if end > len(self._ids):
            room = max(end, 2 * len(self._ids), _ROOM)
            layers, two, _, kv, dim = self._states.shape
            grown, grown_ids = self._states.new_empty(layers, two, room, kv, dim), np.empty(room, np.int64)
            grown[:, :, : self.length], grown_ids[: self.length] = (
                self._states[:, :, : self.length],
                self._ids[: self.length],
            )
            self._states, self._ids = grown, grown_ids
        self._ids[self.length : end] = ids
        self.length = end

    def put(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """States [n, KV, D] of the last n tokens; returns those of all, [length, KV, D] each."""
        both = self._states[layer, :, : self.length]
        both[0, -len(keys) :], both[1, -len(keys) :] = keys, values
        return both[0], both[1]


@dataclass(frozen=True)
class Drafted:
    """What drafting gave, and what it took."""

    tokens: dict[str, list[int]]  # request -> drafts
    read: int  # tokens of the texts that had to be read


class IncrementalDrafter:
    """Drafts greedily for many requests at once. `model` may be exchanged between two calls.

    After an exchange the caches keep the older model's states of what was read: that costs some acceptance, as it does
    with any drafter, and reading everything anew would cost time.
    """

    def __init__(self, model: DraftModel) -> None:
        self.model = model
        self._caches: dict[str, _Cache] = {}

    @torch.inference_mode()
    def draft(self, texts: Mapping[str, Tokens], k: int) -> Drafted:
        """`k` >= 1 tokens to follow each text; a text is all that its request has said so far, not empty."""
        if not texts:
            return Drafted({}, 0)
        caches = [self._caches.setdefault(request, _Cache(self.model)) for request in texts]
        unread = [cache.keep_prefix_of(text) for cache, text in zip(caches, texts.values(), strict=True)]
        read = sum(map(len, unread))
        drafts = [self._next(caches, unread)]
        while len(drafts) < k:
            drafts.append(self._next(caches, list(drafts[-1][:, None])))
        by_request = np.stack(drafts, axis=1).tolist()
        return Drafted(dict(zip(texts, by_request, strict=True)), read)

    def retain(self, live: Container[str]) -> None:
        """Drop the caches of all requests that are not in `live`."""
        self._caches = {request: cache for request, cache in self._caches.items() if request in live}

    def _next(self, caches: list[_Cache], unread: list[Tokens]) -> npt.NDArray[np.int64]:
        """Read the `unread` tokens of each request; returns the likeliest token to follow, [requests]."""
        bounds = np.cumsum([0, *map(len, unread)]).tolist()
        positions = np.concatenate([np.arange(len(u)) + c.length for c, u in zip(caches, unread, strict=True)])
        for cache, ids in zip(caches, unread, strict=True):
            cache.expect(ids)
        model, device = self.model, self.model.embed_tokens.device
        tokens = torch.from_numpy(np.concatenate(unread).astype(np.int64)).to(device)
        hidden = model(tokens, torch.from_numpy(positions).to(device), _attend_cached(caches, bounds))
        last = hidden[torch.tensor(bounds[1:], device=device) - 1]
        found: npt.NDArray[np.int64] = model.draft_ids[model.logits(last).argmax(-1)].cpu().numpy()
        return found


def _attend_cached(caches: list[_Cache], bounds: list[int]) -> Attend:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for cache, a, b in zip(caches, bounds, bounds[1:], strict=False):
            keys, values = cache.put(layer, k[a:b], v[a:b])
            parts.append(attention(q[a:b], keys, values))
        return torch.cat(parts)

    return attend
