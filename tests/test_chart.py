import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from aurora import __version__
from tests.kuberay import RAY_CLUSTER
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "aurora" / "deploy"
CHART = DEPLOY / "helm" / "aurora"
MANIFESTS = DEPLOY / "kubernetes" / "aurora.yaml"
CPU = yaml.safe_load((CHART / "values-cpu.yaml").read_text())
OWN_SECRET = {"auth": {"existingSecret": "aurora-auth"}}
KUBERNETES = ("1.28.0", "1.37.0")  # the oldest that the chart takes, and the newest whose schemas there are

# Helm's Go library stays out of this process: it brings a runtime with signal handlers of its own.
RENDER = """
import helm_python as helm, json, sys
chart, values = json.load(sys.stdin)
lint = helm.lint(chart, values, strict=True)
with helm.Chart.load(chart) as loaded:
    try:
        print(json.dumps({"lint": lint, "files": loaded.render(values, name="aurora", namespace="default")}))
    except helm.HelmError as error:
        print(json.dumps({"lint": lint, "error": str(error)}))
"""


@cache
def helm(values: str) -> dict[str, Any]:
    """What Helm says to the chart with these values (JSON): lint, and files or an error."""
    pytest.importorskip("helm_python", reason="Helm's library has no wheel for this machine: the chart is not rendered")
    asked = json.dumps([str(CHART), json.loads(values)])
    result = subprocess.run([sys.executable, "-c", RENDER], input=asked, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    answer = helm(json.dumps(values))
    assert "error" not in answer, answer["error"]
    texts = [text for name, text in sorted(answer["files"].items()) if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def refused(values: dict[str, Any]) -> str:
    return helm(json.dumps(values)).get("error", "")


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod template of each group of the RayCluster."""
    spec = of_kind(documents, "RayCluster")["spec"]
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


VALUES = {
    "default": {},
    "secret": OWN_SECRET,
    "cpu": CPU,
    "no-learning": {"train": {"enabled": False}},
    "replicas": {"serve": {"replicas": 3}, "networkPolicy": {"enabled": False}},
}


@pytest.fixture(params=VALUES.values(), ids=VALUES.keys())
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(request.param)


def check_against_schemas(documents: list[dict[str, Any]], version: str) -> None:
    import kubernetes_validate

    for document in documents:
        if document["kind"] == "RayCluster":
            jsonschema.validate(document, RAY_CLUSTER)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    for template in pods(documents).values():
        in_a_kind = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(in_a_kind, version, strict=True)


def test_kubernetes_takes_what_helm_renders(documents: list[dict[str, Any]]) -> None:
    check_against_schemas(documents, KUBERNETES[-1])


def test_a_head_that_comes_back_knows_what_it_knew_and_is_waited_for(documents: list[dict[str, Any]]) -> None:
    environment = {
        name: {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
        for name, pod in pods(documents).items()
    }
    assert all(int(each["RAY_gcs_rpc_server_reconnect_timeout_s"]) > 60 for each in environment.values())
    assert [name for name, each in environment.items() if each.get("RAY_gcs_storage") == "rocksdb"] == ["head"]
    mounts = [mount["mountPath"] for mount in pods(documents)["head"]["spec"]["containers"][0]["volumeMounts"]]
    assert environment["head"]["RAY_gcs_storage_path"].startswith(tuple(mounts))


def test_the_oldest_kubernetes_takes_it_too() -> None:
    check_against_schemas(rendered({}), KUBERNETES[0])


def test_the_schemas_would_notice() -> None:
    documents = list(yaml.safe_load_all(MANIFESTS.read_text()))
    container = pods(documents)["serve"]["spec"]["containers"][0]
    container["imagePullPolice"] = container.pop("imagePullPolicy")
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolice"):
        check_against_schemas(documents, KUBERNETES[-1])
    documents = list(yaml.safe_load_all(MANIFESTS.read_text()))
    of_kind(documents, "RayCluster")["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        check_against_schemas(documents, KUBERNETES[-1])


@pytest.mark.parametrize("values", [{}, CPU])
def test_helm_has_nothing_to_say_against_the_chart(values: dict[str, Any]) -> None:
    lint = helm(json.dumps(values))["lint"]
    assert lint["errors"] == []
    assert {message["error"] for message in lint["messages"]} == {"icon is recommended"}


def test_the_manifests_without_helm_are_those_of_the_chart() -> None:
    documents = [document for document in yaml.safe_load_all(MANIFESTS.read_text()) if document]
    check_against_schemas(documents, KUBERNETES[-1])
    by_name = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    from_chart = rendered(OWN_SECRET)
    assert by_name == {(document["kind"], document["metadata"]["name"]): document for document in from_chart}


def test_the_chart_is_of_this_version_and_this_ray() -> None:
    import ray

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert yaml.safe_load((CHART / "values.yaml").read_text())["rayVersion"] == ray.__version__


def test_rays_own_autoscaler_reads_the_roles_from_the_cluster(documents: list[dict[str, Any]]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive

    cluster = of_kind(documents, "RayCluster")
    cluster["metadata"]["namespace"] = "default"
    types = derive(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for role in set(types) - {"headgroup"}:
        assert types[role]["resources"]["head" if role == "router" else role] == 1
    replicas = types["serve"]["min_workers"]
    words = command(documents, "router").split()
    assert words[words.index("--replicas") + 1] == str(replicas)
    on_gpus = "GPU" in types["serve"]["resources"]
    assert on_gpus == ("server.num_gpus=1" in words)
    assert ("train" in types) == ("--no-learning" not in words)


def command(documents: list[dict[str, Any]], group: str) -> str:
    shell, option, text = [*pods(documents)[group]["spec"]["containers"][0]["command"], *_args(documents, group)]
    assert (shell, option) == ("/bin/bash", "-c")
    return text


def _args(documents: list[dict[str, Any]], group: str) -> list[str]:
    return pods(documents)[group]["spec"]["containers"][0]["args"]


def test_aurora_takes_the_flags_that_the_router_gives_it() -> None:
    import argparse
    import shlex

    from aurora.options import add_config_options, read_config

    values = {"model": "org/a model", "args": ["--k-max", "6", "--set", "trainer.seed=7"]}
    text = command(rendered(values), "router").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("aurora serve")]
    words = shlex.split(line.removesuffix("&"))
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    config = read_config(*parser.parse_known_args(words[2:]))
    assert (config.model, config.speculation.k_max, config.trainer.seed) == ("org/a model", 6, 7)
    assert (config.server.host, config.server.port, config.cluster.address) == ("0.0.0.0", 8000, "auto")
    assert (config.server.num_gpus, config.trainer.num_gpus, config.cluster.wait_s) == (1, 1, 1800)


def test_no_pod_runs_as_root_or_without_bounds_or_with_a_token_for_kubernetes(documents: list[dict[str, Any]]) -> None:
    for pod in pods(documents).values():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        (container,) = spec["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][bound])


def test_every_ray_process_asks_for_the_token_and_only_the_router_has_the_api_key(
    documents: list[dict[str, Any]],
) -> None:
    for group, pod in pods(documents).items():
        env = {each["name"]: each for each in pod["spec"]["containers"][0]["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "aurora-auth", "key": "ray-token"}
        assert ("AURORA_API_KEY" in env) == (group == "router")
    assert of_kind(documents, "RayCluster")["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_the_service_finds_the_router_and_its_probes_ask_what_aurora_answers_without_a_key(
    documents: list[dict[str, Any]],
) -> None:
    from serve.access import OPEN_PATHS

    service = of_kind(documents, "Service")["spec"]
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(documents).items()}
    found = [name for name in labels if service["selector"].items() <= labels[name].items()]
    assert found == ["router"]
    (container,) = pods(documents)["router"]["spec"]["containers"]
    assert {port["name"] for port in container["ports"]} >= {port["targetPort"] for port in service["ports"]}
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert set(probes.values()) <= OPEN_PATHS


def test_the_secret_is_made_once_and_never_when_there_is_one() -> None:
    secret = of_kind(rendered({}), "Secret")
    assert set(secret["data"]) == {"api-key", "ray-token"}
    assert len(set(secret["data"].values())) == 2
    assert all(len(value) >= 48 for value in secret["data"].values())
    assert "Secret" not in {document["kind"] for document in rendered(OWN_SECRET)}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"serve": {"replicas": 0}}, ["/serve/replicas", "got 0, want 1"]),
        ({"serve": {"replics": 2}}, ["/serve", "replics"]),
        ({"image": {"tag": "a b"}}, ["/image/tag", "a b"]),
        ({"service": {"port": 70000}}, ["/service/port"]),
        ({"storage": {"size": "100GB"}}, ["/storage/size", "100GB"]),
        ({"model": "--host"}, ["/model", "--host"]),
        ({"rayVersion": 2.6}, ["/rayVersion"]),
        ({"networkPolicy": {"enabled": "yes"}}, ["/networkPolicy/enabled"]),
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, Any], names: list[str]) -> None:
    said = refused(values)
    for name in names:
        assert name in said


RAY = """#!/bin/bash
printf '%s\\n' "$@" > "$HERE/ray.txt"
mkdir -p "$HERE/session_latest/sockets"
bound='import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])'
python3 -SE -c "$bound" "$HERE/session_latest/sockets/raylet"
while [ ! -e "$HERE/die" ]; do sleep 0.1; done
exit 3
"""
AURORA = """#!/bin/bash
printf '%s\\n' "$@" > "$HERE/aurora.txt"
trap 'echo ended > "$HERE/ended"; exit 0' TERM
while :; do sleep 0.1 & wait $!; done
"""


@pytest.fixture
def router(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """The router's container command, with a Ray and an Aurora that only wait."""
    for name, script in (("ray", RAY), ("aurora", AURORA)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    documents = list(yaml.safe_load_all(MANIFESTS.read_text()))
    (params,) = [
        group["rayStartParams"]
        for group in of_kind(documents, "RayCluster")["spec"]["workerGroupSpecs"]
        if group["groupName"] == "router"
    ]
    start = f"ray start --address=head:6379 --block --resources={params['resources']}"
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HERE": str(tmp_path), "KUBERAY_GEN_RAY_START_CMD": start}
    text = command(documents, "router").replace("/tmp/ray", str(tmp_path))
    process = subprocess.Popen(["/bin/bash", "-c", text], env=env, text=True, start_new_session=True)
    yield process
    with suppress(ProcessLookupError):  # a container would end with its first process
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_router_joins_ray_then_serves_and_hands_on_a_stop(router: "subprocess.Popen[str]", tmp_path: Path) -> None:
    wait_until((tmp_path / "aurora.txt").exists, 120, "it did not serve")
    assert '--resources={"head": 1}' in (tmp_path / "ray.txt").read_text().splitlines()
    assert (tmp_path / "aurora.txt").read_text().splitlines()[:2] == ["serve", "smollm2-135m-instruct"]
    router.terminate()
    assert router.wait(120) == 0
    assert (tmp_path / "ended").exists()


def test_the_routers_container_ends_with_its_ray_node(router: "subprocess.Popen[str]", tmp_path: Path) -> None:
    wait_until((tmp_path / "aurora.txt").exists, 120, "it did not serve")
    (tmp_path / "die").touch()
    assert router.wait(120) == 3
