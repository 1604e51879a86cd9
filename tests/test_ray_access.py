import os
from pathlib import Path

import pytest

from aurora.config import UserError
from aurora.ray_access import keep_private, require_token


def test_a_token_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ray" / "token"
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that what is set below goes with it
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    require_token(insecure=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert file.stat().st_mode & 0o777 == 0o600
    token = file.read_text()
    assert len(token) == 64
    file.chmod(0o644)
    keep_private(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text() == token, "the one that others may have used already"


def test_a_cluster_without_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=disabled: whoever reaches Ray's ports could run code here"):
        require_token(insecure=False)
    require_token(insecure=True)


def test_a_place_that_takes_no_token_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept there .* name another file in RAY_AUTH_TOKEN_PATH"):
        keep_private(tmp_path / "file" / "token")
