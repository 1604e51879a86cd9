import copy
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.cluster_file import check, load
from aurora.config import UserError

ROOT = Path(__file__).parent.parent
CLOUD = ROOT / "ray_cluster.yaml"
ON_PREMISE = ROOT / "aurora" / "deploy" / "ray_on_premise.yaml"
TREES = {file: yaml.safe_load(file.read_text()) for file in (CLOUD, ON_PREMISE)}


def tree_of(file: Path) -> dict[str, Any]:
    return copy.deepcopy(TREES[file])


def test_what_the_shipped_files_describe() -> None:
    cloud = load(CLOUD, ROOT)
    assert (cloud.name, cloud.provider, cloud.gpus) == ("aurora", "aws", {"serve", "train"})
    assert cloud.nodes == {"serve": (1, 4), "train": (1, 2)}
    assert cloud.examples == ()
    on_premise = load(ON_PREMISE, ROOT)
    assert (on_premise.provider, on_premise.gpus) == ("local", frozenset())
    assert on_premise.nodes == {"serve": (2, 2), "train": (1, 1)}
    assert len(on_premise.examples) == 4


def test_notes_say_what_a_file_leaves_to_its_user() -> None:
    tree = tree_of(CLOUD)
    shared, ssh = check(tree, ROOT).notes
    assert "no setup command mounts" in shared
    assert "SSH is open to the whole internet" in ssh
    tree["setup_commands"].insert(0, "sudo mount -t nfs4 files:/ ~/shared")
    tree["provider"]["security_group"]["IpPermissions"][0]["IpRanges"] = [{"CidrIp": "198.51.100.0/24"}]
    assert check(tree, ROOT).notes == ()


def put(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    """A change of the tree: `value` at `path`; None takes the key away."""

    def change(tree: Any) -> None:
        *branches, leaf = path
        for name in branches:
            tree = tree[name]
        if value is None:
            del tree[leaf]
        else:
            tree[leaf] = value

    return change


def replace(key: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A change of every command of `key`."""

    def change(tree: dict[str, Any]) -> None:
        assert any(old in command for command in tree[key])
        tree[key] = [command.replace(old, new) for command in tree[key]]

    return change


TYPES = "available_node_types"
WORKER, HEAD = "worker_start_ray_commands", "head_start_ray_commands"
RULES = ("provider", "security_group", "IpPermissions", 0)
BAD = [
    (CLOUD, put("avaliable_node_types", value={}), ["avaliable_node_types"]),
    (CLOUD, put("max_workers", value="eight"), ["max_workers", "eight"]),
    (CLOUD, put("max_workers", value=1), ["max_workers"]),
    (CLOUD, put("provider", "type", value="ibm-cloud"), ["ibm-cloud"]),
    (CLOUD, put("provider", "type", value=None), ["provider", "type"]),
    (CLOUD, put("head_node_type", value="hed"), ["head_node_type"]),
    (CLOUD, put(TYPES, value=None), ["head_node_type", TYPES]),
    (CLOUD, put(TYPES, "serve", "resources", "serve", value=None), [TYPES, '{"serve": 1}']),
    (CLOUD, put(TYPES, "train", "resources", "train", value=None), [TYPES, '{"train": 1}']),
    (CLOUD, put(TYPES, "train", "resources", "serve", value=1), ["only one type", '"serve"']),
    (CLOUD, put(TYPES, "serve", "min_workers", value=0), [f"{TYPES}.serve.min_workers", "0", "1 or more"]),
    (CLOUD, put(TYPES, "train", "min_workers", value=3), [f"{TYPES}.train.min_workers", "3"]),
    (CLOUD, put(TYPES, "head", "resources", "CPU", value=1), [f"{TYPES}.head.resources.CPU", "1", "2 or more"]),
    (CLOUD, put(TYPES, "head", "resources", "CPU", value=None), [f"{TYPES}.head.resources.CPU", "None"]),
    (CLOUD, put("file_mounts", "~/.ray/auth_token", value=None), ["file_mounts", "auth_token"]),
    (CLOUD, put("file_mounts", "~/aurora", value=None), ["file_mounts", "~/aurora: ."]),
    (CLOUD, put("file_mounts", "~/aurora", value="docs"), ["file_mounts.~/aurora", "docs", "scripts/install"]),
    (CLOUD, replace("setup_commands", "chmod 600", "chmod 644"), ["setup_commands", "chmod 600"]),
    (CLOUD, replace(WORKER, "RAY_AUTH_MODE=token ", ""), [WORKER, "RAY_AUTH_MODE=token"]),
    (CLOUD, replace(HEAD, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=tokenless"), [HEAD, "RAY_AUTH_MODE=token"]),
    (CLOUD, replace(HEAD, "ray start", "ray stop"), [HEAD, "ray start"]),
    (CLOUD, replace(HEAD, "=127.0.0.1", "=0.0.0.0"), [HEAD, "0.0.0.0", "--dashboard-host=127.0.0.1"]),
    (CLOUD, replace(HEAD, "--autoscaling-config", "--x"), [HEAD, "--autoscaling-config"]),
    (CLOUD, put(*RULES, value={"FromPort": 0, "ToPort": 65535}), ["IpPermissions", "0 to 65535", "22 only"]),
    (ON_PREMISE, put("provider", "worker_ips", value=[]), ["provider.worker_ips", "[]"]),
    (ON_PREMISE, put("provider", "worker_ips", value=["192.0.2.11"]), ["provider.worker_ips", "no train node"]),
    (ON_PREMISE, put("provider", "worker_ips", value=["192.0.2.13"]), ["provider.worker_ips", "no serve node"]),
    (ON_PREMISE, put("provider", "head_ip", value="192.0.2.11"), ["provider.worker_ips", "is the head's"]),
    (ON_PREMISE, put("provider", "head_ip", value=None), ["provider.head_ip", "None"]),
    (ON_PREMISE, put("head_node_type", value="head"), [TYPES, "leave it"]),
    (ON_PREMISE, replace(WORKER, "--resources=", "--labels="), [WORKER, "--resources"]),
    (ON_PREMISE, replace(WORKER, "RAY_AUTH_MODE=token ", ""), [WORKER, "RAY_AUTH_MODE=token"]),
]


@pytest.mark.parametrize(("file", "change", "names"), BAD)
def test_a_bad_file_is_refused_by_key_value_and_remedy(
    file: Path, change: Callable[[dict[str, Any]], None], names: list[str]
) -> None:
    tree = tree_of(file)
    change(tree)
    with pytest.raises(UserError) as refused:
        check(tree, ROOT)
    for name in names:
        assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_resource_of_a_role_does_not_belong_to_the_head() -> None:
    tree = tree_of(CLOUD)
    tree[TYPES]["head"]["resources"]["serve"] = tree[TYPES]["serve"]["resources"].pop("serve")
    with pytest.raises(UserError, match="starve Ray's own services"):
        check(tree, ROOT)


@pytest.mark.parametrize(
    ("text", "says"), [(None, "No such file"), ("a: [", "not valid YAML"), ("- a", "list at the top"), ("", "NoneType")]
)
def test_a_file_that_is_no_cluster_file(text: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=says) as refused:
        load(file, ROOT)
    assert str(file) in str(refused.value)


def paths(tree: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return [found for key, value in items for found in ((*path, key), *paths(value, (*path, key)))]


@settings(max_examples=40)
@given(st.data())
def test_whatever_is_changed_the_file_is_taken_or_refused_as_the_users(data: st.DataObject) -> None:
    tree = tree_of(data.draw(st.sampled_from([CLOUD, ON_PREMISE])))
    path = data.draw(st.sampled_from(paths(tree)))
    put(*path, value=data.draw(st.sampled_from([None, 0, -1, 10**6, 1.5, True, "", "x", "serve", [], ["x"], {}])))(tree)
    with suppress(UserError):
        cluster = check(tree, ROOT)
        assert all(1 <= least <= most for least, most in cluster.nodes.values())


@pytest.mark.parametrize(
    ("address", "role"), [("192.0.2.13", "train"), ("192.0.2.11", "serve"), ("192.0.2.130", "serve")]
)
def test_on_premise_a_worker_gets_its_role_by_its_address(address: str, role: str, tmp_path: Path) -> None:
    ray = tmp_path / "aurora" / ".venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    hostname = tmp_path / "bin" / "hostname"
    hostname.parent.mkdir()
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$RAY_AUTH_MODE" "$@"\n')
    hostname.write_text(f"#!/bin/sh\necho '{address} 172.17.0.1 '\n")
    for script in (ray, hostname):
        script.chmod(0o755)
    env = {"HOME": str(tmp_path), "PATH": f"{hostname.parent}:{os.environ['PATH']}", "RAY_HEAD_IP": "192.0.2.10"}
    start = TREES[ON_PREMISE]["worker_start_ray_commands"][-1].replace("ulimit -n 65536;", "")
    mode, *words = subprocess.run(
        ["bash", "-c", start], env=env, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert mode == "token"
    assert "--address=192.0.2.10:6379" in words
    (resources,) = [word.removeprefix("--resources=") for word in words if word.startswith("--resources=")]
    assert json.loads(resources) == {role: 1}
