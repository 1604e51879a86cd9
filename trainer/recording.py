"""Served requests on disk, with all that verifying anybody's drafts for them needs.

Speculation is lossless: what the target says does not depend on the drafter. So a request recorded once, its tokens
and the target's hidden states, replays under every drafter and every training policy. A directory holds `manifest.json`
(how it was recorded) and shards of whole requests in safetensors; a shard appears complete or not at all, so a
recording that was interrupted is continued where it stopped.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from aurora.config import UserError
from aurora.trace import TABLE_VERSION, DraftTrace
from trainer.sequence import Sequence, from_bf16

MANIFEST = "manifest.json"
_SHARD_PREFIX = "requests-"
_SHARD = re.compile(_SHARD_PREFIX + r"\d{6}\.safetensors")
_SHARD_BYTES = 64 << 20
_STAGING = ".part"  # of what was not written to its end


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the requests of a recording were served; the same for all of them."""

    model: str
    fingerprint: str  # of the target's weights (`drafters.TargetWeights`)
    temperature: float
    top_p: float
    top_k: int  # 0: unlimited
    max_tokens: int
    seed: int


class RequestInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where one request stands in its shard."""

    key: str
    domain: str
    prompt_tokens: int
    rows: int  # target states; the request has one token more
    first_row: int


@dataclass(frozen=True)
class _Place:
    shard: Path
    info: RequestInfo
    first_token: int


def request_key(turns: tuple[str, ...], turn: int) -> str:
    """The name of one request of a conversation: the same wherever the conversation is met."""
    digest = hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()
    return f"{digest[:16]}.{turn}"


class Recording:
    """The requests of a directory, by key. Raises UserError when it is not a recording or a shard is damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = _read_manifest(directory)
        self._places = {place.info.key: place for shard in _shards(directory) for place in _index(shard)}

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, key: str) -> Sequence:
        """One request: all T tokens that the target read, T + 1 ids. Raises KeyError for one that is not here."""
        place = self._places[key]
        info = place.info
        rows = slice(info.first_row, info.first_row + info.rows)
        with safe_open(place.shard, framework="pt") as file:
            ids = file.get_slice("ids")[place.first_token : place.first_token + info.rows + 1]
            hidden, aux = file.get_slice("hidden")[rows], file.get_slice("aux")[rows]
        return Sequence(key, info.domain, 0, info.prompt_tokens, ids.long().numpy(), hidden, aux, ())


class RecordingWriter:
    """Adds requests to a new recording or to one that was interrupted."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Raises UserError when `directory` holds a recording that was made in another way, or something else."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._claim(manifest)
        shards = _shards(directory)
        self.keys = {place.info.key for shard in shards for place in _index(shard)}
        self.nbytes = sum(shard.stat().st_size for shard in shards)
        self._next = 1 + max((int(s.stem.removeprefix(_SHARD_PREFIX)) for s in shards), default=0)
        self._pending: list[Sequence] = []
        self._pending_bytes = 0

    def _claim(self, manifest: Manifest) -> None:
        path = self.directory / MANIFEST
        if path.exists():
            found = _read_manifest(self.directory)
            for name in manifest.__struct_fields__:
                old, new = getattr(found, name), getattr(manifest, name)
                if old != new:
                    raise UserError(f"{self.directory} was recorded with {name} {old}, not {new}: give another --out")
        elif any(path.suffix != _STAGING for path in self.directory.iterdir()):
            raise UserError(f"{self.directory} is not empty and no recording: give another --out")
        else:
            _write_whole(path, msgspec.json.format(msgspec.json.encode(manifest)))

    def add(self, sequence: Sequence) -> None:
        """Take a finished request that begins with its prompt; it is on disk after the next full shard or `flush`."""
        assert sequence.position == 0, "a recorded request begins at its first token"
        assert len(sequence.ids) == len(sequence.hidden) + 1, "its last token was emitted, not read"
        self._pending.append(sequence)
        self._pending_bytes += sequence.hidden.nbytes + sequence.aux.nbytes + 4 * len(sequence.ids)
        self.keys.add(sequence.request_id)
        if self._pending_bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pending:
            return
        infos, first = [], 0
        for sequence in self._pending:
            rows = len(sequence.hidden)
            info = RequestInfo(
                key=sequence.request_id,
                domain=sequence.domain,
                prompt_tokens=sequence.prompt_tokens,
                rows=rows,
                first_row=first,
            )
            infos.append(info)
            first += rows
        tensors = {
            "ids": torch.cat([torch.from_numpy(s.ids).int() for s in self._pending]),
            "hidden": torch.cat([s.hidden for s in self._pending]),
            "aux": torch.cat([s.aux for s in self._pending]),
        }
        path = self.directory / f"{_SHARD_PREFIX}{self._next:06d}.safetensors"
        staging = path.with_suffix(_STAGING)
        save_file(tensors, staging, metadata={"requests": msgspec.json.encode(infos).decode()})
        _publish(staging, path)
        self.nbytes += path.stat().st_size
        self._next += 1
        self._pending, self._pending_bytes = [], 0


class Verified(NamedTuple):
    """A greedy neural draft for a recorded request."""

    known: int  # tokens of the request before it
    tokens: list[int]  # those after the first wrong one need not be known
    accepted: int
    version: int  # drafter that drew it


def traces_of(request: Sequence, prompt_rows: int, drafts: Iterable[Verified] = ()) -> Iterator[DraftTrace]:
    """The traces of serving a recorded request: of its prompt the newest rows, then one a step.

    A step verifies the one of `drafts` that was drawn there or decodes plainly. What the target would have said on
    rejected tokens was never recorded, so the rows of a step end with the accepted ones.
    """
    drawn = {draft.known: draft for draft in drafts}
    first, at = max(0, request.prompt_tokens - prompt_rows), request.prompt_tokens
    yield _trace(request, first, at - first, None)
    while at < len(request.hidden):
        draft = drawn.get(at + 1)
        yield _trace(request, at, 1, draft)
        at += 1 + (draft.accepted if draft is not None else 0)


def _trace(request: Sequence, first: int, read: int, draft: Verified | None) -> DraftTrace:
    """A step that reads `read` known tokens from row `first` on, and then the draft."""
    tokens, accepted = (draft.tokens, draft.accepted) if draft is not None else ([], 0)
    emitted = first + read
    end = emitted + accepted
    return DraftTrace(
        request_id=request.request_id,
        step=first,
        time_s=0.0,
        position=first,
        prompt_tokens=request.prompt_tokens,
        input_ids=np.append(request.ids[first:emitted], tokens).astype(np.int32),
        emitted_ids=request.ids[emitted : end + 1].astype(np.int32),
        k=len(tokens),
        accepted=accepted,
        draft_q=np.ones(len(tokens), np.float32),
        top_q_ids=np.zeros((len(tokens), 0), np.int32),
        top_q=np.zeros((len(tokens), 0), np.float32),
        hidden=from_bf16(request.hidden[first:end]),
        aux=from_bf16(request.aux[first:end]),
        drafter_version=draft.version if draft is not None else TABLE_VERSION,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        domain=request.domain,
    )


def _shards(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if _SHARD.fullmatch(path.name))


def _index(shard: Path) -> Iterator[_Place]:
    try:
        with safe_open(shard, framework="pt") as file:
            infos = msgspec.json.decode(file.metadata()["requests"], type=list[RequestInfo])
    except (OSError, SafetensorError, KeyError, TypeError, msgspec.MsgspecError) as error:
        raise UserError(f"{shard}: damaged ({error}); remove it and record again, the other shards are kept") from error
    # A request has one token more than rows, so the tokens of the i-th begin i further than its rows.
    return (_Place(shard, info, info.first_row + i) for i, info in enumerate(infos))


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise UserError(f"{directory}: no recording here ({error.strerror}); make one with `aurora record`") from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{path}: {error}; record into another directory") from error


def _write_whole(path: Path, content: bytes) -> None:
    staging = path.with_suffix(_STAGING)
    staging.write_bytes(content)
    _publish(staging, path)


def _publish(staging: Path, final: Path) -> None:
    """Flush and rename: `final` is there with all of its content, or it is not there."""
    _flush(staging)
    staging.replace(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
