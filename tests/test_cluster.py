import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parent.parent / "ray_cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_ray_accepts_the_file_with_and_without_its_defaults(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(copy.deepcopy(cluster))
    filled = prepare_config(copy.deepcopy(cluster))
    validate_config(filled)
    assert filled["available_node_types"]["serve"]["max_workers"] == 4


def test_ray_refuses_a_misspelt_key(cluster: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    cluster["avaliable_node_types"] = {}
    with pytest.raises(jsonschema.ValidationError, match="avaliable_node_types"):
        validate_config(cluster)


def test_each_role_has_a_node_type_with_its_resource(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert set(types) == {"head", "serve", "train"}
    assert cluster["head_node_type"] == "head"
    for role in types:
        assert types[role]["resources"][role] == 1
        assert {other for other in types if other in types[role]["resources"]} == {role}
    assert sum(types[role]["max_workers"] for role in types) <= cluster["max_workers"]


def test_every_node_starts_with_token_authentication(cluster: dict[str, Any]) -> None:
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in command for command in cluster["setup_commands"])


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    start = cluster["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    ports = [rule["FromPort"] for rule in cluster["provider"]["security_group"]["IpPermissions"]]
    assert ports == [22]


def test_nodes_are_set_up_by_make_install(cluster: dict[str, Any]) -> None:
    assert any(command.endswith("make install") for command in cluster["setup_commands"])
    assert cluster["file_mounts"]["~/aurora"] == "."
