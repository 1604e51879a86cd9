from pathlib import Path

import pytest

from aurora.config import UserError
from aurora.deployment import DEPLOYMENT_FILE, _share
from aurora.scale import scale


@pytest.mark.parametrize(
    ("replicas", "written", "said"),
    [
        (0, "{}", "give 1 or more"),
        (2, None, "no `aurora serve --replicas N` runs there"),
        (2, "{", "is damaged"),
        (2, "[]", "is damaged"),
        (2, '{"address": "127.0.0.1:1"}', "is damaged"),
    ],
)
def test_what_cannot_be_scaled_is_named(tmp_path: Path, replicas: int, written: str | None, said: str) -> None:
    if written is not None:
        (tmp_path / DEPLOYMENT_FILE).write_text(written)
    with pytest.raises(UserError, match=said):
        scale(replicas, tmp_path)


@pytest.mark.parametrize(
    ("cores", "among", "shares"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([4, 5, 6], 2, [[4], [5]]),
        ([0, 1], 3, [[0], [1], [0]]),
        ([7], 2, [[7], [7]]),
    ],
)
def test_replicas_share_a_machines_cores_out(cores: list[int], among: int, shares: list[list[int]]) -> None:
    assert [_share(cores, number, among) for number in range(among)] == shares
