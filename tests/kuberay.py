"""What this project uses of KubeRay's RayCluster, as a JSON Schema that takes nothing else.

Written after KubeRay's API reference (group ray.io/v1: RayCluster, HeadGroupSpec, WorkerGroupSpec), whose generated
schema is in no package registry. Pod templates are left to Kubernetes' own schema.
"""

from typing import Any

_POSITIVE = {"type": "integer", "minimum": 1}
_TEMPLATE = {"type": "object", "required": ["metadata", "spec"]}
_PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_HEAD = _object(["rayStartParams", "template"], rayStartParams=_PARAMS, template=_TEMPLATE)
_WORKER = _object(
    ["groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    replicas=_POSITIVE,
    minReplicas=_POSITIVE,
    maxReplicas=_POSITIVE,
    rayStartParams=_PARAMS,
    template=_TEMPLATE,
)
RAY_CLUSTER = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata={"type": "object", "required": ["name"]},
    spec=_object(
        ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
        rayVersion={"type": "string"},
        headGroupSpec=_HEAD,
        workerGroupSpecs={"type": "array", "items": _WORKER, "minItems": 1},
    ),
)
