"""A cluster file for `ray up`: read, accepted by Ray itself, and held to what Aurora needs. Nothing is started.

Ray knows whether a file is well-formed. It does not know that a Server waits for the resource "serve", that weights
travel over a shared directory, or that whoever reaches its ports without a token can run code: `check` does.
"""

import copy
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aurora.config import UserError

ROLES = ("serve", "train")
TOKEN = "~/.ray/auth_token"  # noqa: S105 - where it lies, not what it says
SOURCE = "~/aurora"  # where the nodes have this working tree
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEAD_CPUS = 2
_SSH = 22
# What Ray's reader raises for a file that its schema lets pass: it looks at values without asking for their types.
_RAY_ERRORS = (ValueError, RuntimeError, NotImplementedError, TypeError, KeyError, AttributeError)
_EXAMPLES = [ipaddress.ip_network(text) for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]


@dataclass(frozen=True)
class Cluster:
    """What a checked file describes. `nodes`: of a role, at the start and at most. `gpus`: roles whose nodes have one.

    `notes` are for the user to read; `examples` are addresses that stand for others and must be replaced.
    """

    name: str
    provider: str
    nodes: dict[str, tuple[int, int]]
    gpus: frozenset[str]
    notes: tuple[str, ...]
    examples: tuple[str, ...]


def load(file: Path, source: Path) -> Cluster:
    """Read and check a file. Raises UserError."""
    tree = _read(file)
    try:
        return check(tree, source)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give an existing cluster file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file}: {type(tree).__name__} at the top; a cluster file is a mapping, see ray_cluster.yaml")
    return tree


def check(tree: dict[str, Any], source: Path) -> Cluster:
    """Raises UserError, which names key, value and remedy, for the first thing that would not work.

    source: directory that relative paths in `file_mounts` start from.
    """
    _ray_accepts(tree)
    _check_mounts(tree, source)
    _check_starts(tree)
    _check_firewall(tree)
    if tree["provider"]["type"] == "local":
        return _on_premise(tree)
    return _in_cloud(tree)


def _bad(key: str, value: object, remedy: str) -> UserError:
    text = value if isinstance(value, str) else repr(value)
    return UserError(f"{key}: {text[:120]}: {remedy}")


def _ray_accepts(tree: dict[str, Any]) -> None:
    """Ray's schema, before and after it has filled in its defaults; needs no network."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    provider = tree.get("provider")
    if isinstance(provider, dict) and provider.get("type") == "local":
        _check_addresses(tree)  # Ray would end this process
    try:
        validate_config(copy.deepcopy(tree))
        validate_config(prepare_config(copy.deepcopy(tree)))
    except jsonschema.ValidationError as error:
        key = ".".join(map(str, error.absolute_path)) or "the file"
        value = error.instance if isinstance(error.instance, str | int | float) else type(error.instance).__name__
        raise _bad(key, value, f"Ray takes no such cluster file: {' '.join(error.message.split())[-300:]}") from error
    except _RAY_ERRORS as error:
        raise UserError(f"Ray takes no such cluster file: {' '.join(str(error).split())}") from error


def _check_addresses(tree: dict[str, Any]) -> None:
    provider = tree["provider"]
    if tree.get("available_node_types") or tree.get("head_node_type"):
        raise _bad(
            "available_node_types",
            tree.get("available_node_types", tree.get("head_node_type")),
            "Ray wants none with provider.type local; leave it and head_node_type out",
        )
    head, workers = provider.get("head_ip"), provider.get("worker_ips")
    if not isinstance(head, str) or not head:
        raise _bad("provider.head_ip", head, "give the address of the head")
    if not isinstance(workers, list) or not workers or not all(isinstance(ip, str) and ip for ip in workers):
        raise _bad("provider.worker_ips", workers, "give the addresses of the serve and train nodes as a list")
    if len({head, *workers}) <= len(workers):
        raise _bad("provider.worker_ips", workers, "an address stands there twice, or is the head's; name each once")


def _check_mounts(tree: dict[str, Any], source: Path) -> None:
    mounts = tree.get("file_mounts") or {}
    if TOKEN not in mounts:
        raise _bad("file_mounts", sorted(mounts), f"add {TOKEN}: {TOKEN}, the token that every node asks for")
    if not any(f"chmod 600 {TOKEN}" in command for command in tree.get("setup_commands") or []):
        raise _bad("setup_commands", len(tree.get("setup_commands") or []), f"add `chmod 600 {TOKEN}`")
    if SOURCE not in mounts:
        raise _bad("file_mounts", sorted(mounts), f"add {SOURCE}: . so that the nodes have this working tree")
    tree_dir = source / Path(str(mounts[SOURCE])).expanduser()
    if not (tree_dir / "scripts" / "install").is_file():
        remedy = "no working tree of Aurora's (it has scripts/install); run this in one, or name one"
        raise _bad(f"file_mounts.{SOURCE}", f"{mounts[SOURCE]} ({tree_dir})", remedy)


def _check_starts(tree: dict[str, Any]) -> None:
    """Every Ray process asks for the token, and the dashboard is heard on the head alone."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = _starts(tree, key)
        if not starts:
            raise _bad(key, tree.get(key), "add a command with `ray start`")
        for start in starts:
            if not re.search(r"\bRAY_AUTH_MODE=token\b", start):
                remedy = (
                    "put RAY_AUTH_MODE=token before `ray start`: without it whoever reaches its ports runs code there"
                )
                raise _bad(key, start, remedy)
    for start in _starts(tree, "head_start_ray_commands"):
        host = re.search(r"--dashboard-host[= ]\s*(\S+)", start)
        if host and host[1] not in _LOOPBACK:
            remedy = "say --dashboard-host=127.0.0.1; `ray attach -p 8265` brings the dashboard to you"
            raise _bad("head_start_ray_commands", host[0], remedy)
        if "--autoscaling-config" not in start:
            remedy = "add --autoscaling-config=~/ray_bootstrap_config.yaml; without it no other node starts"
            raise _bad("head_start_ray_commands", start, remedy)


def _starts(tree: dict[str, Any], key: str) -> list[str]:
    commands = tree.get(key) or []
    return [command for command in commands if isinstance(command, str) and re.search(r"\bray start\b", command)]


def _check_firewall(tree: dict[str, Any]) -> None:
    for rule in _rules(tree):
        ports = (rule.get("FromPort"), rule.get("ToPort"))
        if ports != (_SSH, _SSH):
            key = "provider.security_group.IpPermissions"
            raise _bad(key, f"ports {ports[0]} to {ports[1]}", f"open {_SSH} only; the rest goes through SSH")


def _rules(tree: dict[str, Any]) -> list[dict[str, Any]]:
    group = tree["provider"].get("security_group")
    return _mappings(group.get("IpPermissions")) if isinstance(group, dict) else []


def _mappings(values: object) -> list[dict[str, Any]]:
    """Those of a list; Ray's schema does not look into a provider's own keys."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _in_cloud(tree: dict[str, Any]) -> Cluster:
    types, head = tree.get("available_node_types"), str(tree.get("head_node_type"))
    if not types:
        raise _bad("available_node_types", types, "name the types head, serve and train; see ray_cluster.yaml")
    found = {role: _node_type(types, role, head) for role in ROLES}
    resources = types[head]["resources"]
    if resources.get("CPU", 0) < _HEAD_CPUS:
        remedy = f"give the head {_HEAD_CPUS} or more: Ray's own services and the endpoint run there"
        raise _bad(f"available_node_types.{head}.resources.CPU", resources.get("CPU"), remedy)
    nodes = {role: _bounds(tree, name) for role, name in found.items()}
    gpus = frozenset(role for role, name in found.items() if types[name]["resources"].get("GPU"))
    notes = [*_shared_note(tree), *_ssh_note(tree)]
    return Cluster(_name(tree), tree["provider"]["type"], nodes, gpus, tuple(notes), ())


def _node_type(types: dict[str, Any], role: str, head: str) -> str:
    names = [name for name, node in types.items() if node["resources"].get(role)]
    if not names:
        raise _bad("available_node_types", sorted(types), f'give one type resources: {{"{role}": 1}}')
    if len(names) > 1:
        raise _bad("available_node_types", names, f'give only one type the resource "{role}"')
    if names[0] == head:
        remedy = f'leave "{role}" to another type: a busy engine or trainer would starve Ray\'s own services'
        raise _bad(f"available_node_types.{head}.resources", types[head]["resources"], remedy)
    return names[0]


def _bounds(tree: dict[str, Any], name: str) -> tuple[int, int]:
    node, limit = tree["available_node_types"][name], tree["max_workers"]
    least, most = node.get("min_workers", 0), min(node.get("max_workers", limit), limit)
    if not 1 <= least <= most:
        remedy = "1 or more, and no more than its max_workers and the file's: actors wait for such a node"
        raise _bad(f"available_node_types.{name}.min_workers", least, remedy)
    return least, most


def _on_premise(tree: dict[str, Any]) -> Cluster:
    """One kind of machine as far as Ray is concerned: the start command gives each its role by its address."""
    head, workers = tree["provider"]["head_ip"], tree["provider"]["worker_ips"]
    start = _starts(tree, "worker_start_ray_commands")[-1]
    if "--resources=" not in start or not all(role in start for role in ROLES):
        remedy = (
            "start it with --resources='{\"serve\": 1}' or '{\"train\": 1}' by its address; see ray_on_premise.yaml"
        )
        raise _bad("worker_start_ray_commands", start, remedy)
    trains = sum(bool(re.search(rf"(?<![\d.]){re.escape(ip)}(?![\d.])", start)) for ip in workers)
    nodes = {"serve": (len(workers) - trains,) * 2, "train": (trains,) * 2}
    for role, (count, _) in nodes.items():
        if count == 0:
            remedy = f"no {role} node among them: the start command makes a train node of each address that it names"
            raise _bad("provider.worker_ips", workers, remedy)
    examples = tuple(ip for ip in (head, *workers) if _stands_for_another(ip))
    return Cluster(_name(tree), "local", nodes, frozenset(), tuple(_shared_note(tree)), examples)


def _name(tree: dict[str, Any]) -> str:
    return str(tree.get("cluster_name", "default"))


def _stands_for_another(address: str) -> bool:
    """Whether it is one of those that RFC 5737 keeps for documents."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in _EXAMPLES)


def _shared_note(tree: dict[str, Any]) -> list[str]:
    commands = [*(tree.get("initialization_commands") or []), *(tree.get("setup_commands") or [])]
    if any(re.search(r"\bmount\b", command) for command in commands):
        return []
    return [
        "no setup command mounts a directory: unless all nodes share the --shared directory already, models and new "
        "drafters do not reach the serve nodes (with --set cluster.transport=ray the drafters do)"
    ]


def _ssh_note(tree: dict[str, Any]) -> list[str]:
    ranges = [each for rule in _rules(tree) for each in _mappings(rule.get("IpRanges"))]
    open_to_all = any(each.get("CidrIp") == "0.0.0.0/0" for each in ranges)
    return ["SSH is open to the whole internet: narrow provider.security_group to your network"] if open_to_all else []
