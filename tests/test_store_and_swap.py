"""Whatever happens to the store, what drafts is whole and was published, and the target stays as it is."""

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import save_file
from torch import Tensor

from aurora.store import READY, DrafterRefused, DrafterStore
from serve import swap
from serve.swap import DrafterSwap
from tests.plain_drafter import HIDDEN, pack, plain_pair, weights
from tests.test_store import Died, die_at

_BROKEN: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "not finite": lambda w: w["fc.weight"].fill_(float("inf")),
    "missing": lambda w: w.pop("fc.weight"),
    "of another shape": lambda w: w.update({"lm_head.weight": torch.zeros(3, 3)}),
    "of another type": lambda w: w.update({"lm_head.weight": torch.zeros(12, 8, dtype=torch.int8)}),
    "added": lambda w: w.update({"embed_tokens.weight": torch.zeros(30, 8)}),
}


def into(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda directory: save_file(tensors, directory / "model.safetensors")


class StoreAndSwap(RuleBasedStateMachine):
    """A writer that may die at any step, a disk that damages what it holds, and an engine that follows the store."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = DrafterStore(self.root)
        self.published: dict[int, dict[str, Tensor] | None] = {}  # None: what was published is no drafter
        self.damaged: set[int] = set()
        self.rejected: set[int] = set()
        self.seed = 0

    @initialize()
    def start(self) -> None:
        self.publish()
        self.live = DrafterSwap(*plain_pair(packed=True), self.root, 0)
        self.target = self.live.target_checksum()
        self.follow()
        assert self.live.version == 1

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def fresh(self) -> dict[str, Tensor]:
        self.seed += 1
        return weights(self.seed)

    @rule()
    def publish(self) -> None:
        tensors = self.fresh()
        number = self.store.publish(into(tensors), {}).number
        assert number not in self.published, "a number is never given twice"
        self.published[number] = tensors

    @rule(how=st.sampled_from(sorted(_BROKEN)))
    def publish_what_is_no_drafter(self, how: str) -> None:
        tensors = self.fresh()
        _BROKEN[how](tensors)
        self.published[self.store.publish(into(tensors), {}).number] = None

    @rule(step=st.integers(1, 12))
    def die_while_publishing(self, step: int) -> None:
        tensors, before = self.fresh(), self.store.versions()
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, step)
            with suppress(Died):
                self.store.publish(into(tensors), {})
        self.store = DrafterStore(self.root)  # another process
        for number in set(self.store.versions()) - set(before):
            self.published[number] = tensors

    @precondition(lambda self: self.store.versions())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.store.versions()))
        directory = self.root / f"v{number:06d}"
        how = data.draw(st.sampled_from(["flip", "cut", "remove", "add", "link", "record"]))
        file = directory / "model.safetensors"
        if how == "add":
            (directory / "weights.pt").write_bytes(b"a pickle")
        elif how == "record":
            (directory / READY).write_text(json.dumps({"digests": {}, "metadata": {}}))
        elif file.is_symlink() or not file.exists():
            return
        elif how == "flip":
            content = bytearray(file.read_bytes())
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = (content[place] + 1) % 256  # twice is not undone
            file.write_bytes(content)
        elif how == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        else:
            file.unlink()
            if how == "link":
                file.symlink_to(self.root / "v000001" / READY)
        self.damaged.add(number)

    @precondition(lambda self: self.store.latest() is not None)
    @rule()
    def reject(self) -> None:
        latest = self.store.latest()
        assert latest is not None
        self.rejected.add(latest)
        self.store.reject(latest, "drafts worse")

    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        latest = self.store.latest()
        self.store.prune(keep)
        assert self.store.latest() == latest

    @rule(fault=st.none() | st.integers(0, 8))
    def follow(self, fault: int | None = None) -> None:
        """What the server does with the latest version; at write number `fault` the machine fails."""
        latest = self.store.latest()
        if latest is None or latest == self.live.version:
            return
        sound = self.published[latest] is not None and latest not in self.damaged
        before = self.live.version
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(swap, "_packed", pack)
                staged = self.live.stage(latest)
        except DrafterRefused:
            assert not sound
            self.rejected.add(latest)
            self.store.reject(latest, "refused")
            return
        assert self.published[latest] is not None
        with pytest.MonkeyPatch.context() as patch:
            writes = [0]

            def failing(real: Callable[..., Callable[[], None]]) -> Callable[..., Callable[[], None]]:
                def write(*args: object) -> Callable[[], None]:
                    writes[0] += 1
                    if writes[0] - 1 == fault:
                        raise RuntimeError("fault")
                    return real(*args)

                return write

            for name in ("_exchange", "_overwrite"):
                patch.setattr(swap, name, failing(getattr(swap, name)))
            try:
                self.live.commit(staged)
                assert self.live.version == latest
            except RuntimeError:
                assert self.live.version == before

    @invariant()
    def what_drafts_was_published_whole(self) -> None:
        live = getattr(self, "live", None)
        if live is None:
            return
        published = self.published[live.version]
        assert published is not None
        operator = live.drafter.model.fc.cpu_linear
        assert torch.equal(operator(torch.eye(3 * HIDDEN), None, None).T, published["fc.weight"])
        stacked = torch.cat([published[f"midlayer.{p}_proj.weight"] for p in "qkv"])
        assert torch.equal(live.drafter.model.layers[0].qkv_proj.weight, stacked)
        assert torch.equal(live.drafter.lm_head.weight, published["lm_head.weight"])
        assert torch.equal(live.drafter.draft_id_to_target_id, published["d2t"])
        assert live.target_checksum() == self.target

    @invariant()
    def what_is_seen_is_whole_and_not_rejected(self) -> None:
        reader = DrafterStore(self.root)
        assert reader.latest() not in self.rejected
        for number in reader.versions():
            assert number in self.published
            if number not in self.damaged:
                reader.verify(number)
            else:
                with pytest.raises(DrafterRefused):
                    reader.verify(number)


TestStoreAndSwap = StoreAndSwap.TestCase
TestStoreAndSwap.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
