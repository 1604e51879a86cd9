"""Enough of a W&B server for `wandb sync`: it takes one run, its rows, files, artifacts and alerts, and keeps them.

It speaks the part of the protocol that wandb 0.31's client uses: GraphQL for the run, its files, artifacts and alerts,
the file stream for rows, plain PUT for what is uploaded.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request

_ENTITY = "someone"


@dataclass
class Received:
    """What clients sent."""

    url: str = ""  # of this server, once it is known
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)  # by line of the history
    complete: bool = False  # the client said that this was all
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # operations that it does not know

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        known = {
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "RunResumeStatus": lambda _: {"model": None},
            "UpsertBucket": self._run,
            "CreateArtifact": self._artifact,
            "CreateRunFiles": self._run_files,
            "NotifyScriptableRunAlert": self._alert,
        }
        if operation not in known:
            self.unknown.append(operation)
            return {}
        return known[operation](variables)

    def _run(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.runs.append(variables)
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": _ENTITY}}
        plain = dict.fromkeys(("displayName", "description", "config", "sweepName"))
        bucket = {"id": "run", "name": variables["name"], "project": project, "historyLineCount": 0, **plain}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Answered as if the contents were there already, so that none are uploaded."""
        self.artifacts.append(variables["input"])
        name = f"artifact-{len(self.artifacts)}"
        sequence = {"latestArtifact": {"id": name}}
        return {"createArtifact": {"artifact": {"id": name, "state": "COMMITTED", "artifactSequence": sequence}}}

    def _run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    def _alert(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def stream(self, body: dict[str, Any]) -> None:
        """A piece of the file stream."""
        history = (body.get("files") or {}).get("wandb-history.jsonl")
        if history is not None:
            rows = map(json.loads, history["content"])
            self.rows.update(enumerate(rows, history["offset"]))
        self.complete = self.complete or bool(body.get("complete"))


def wandb_app(received: Received) -> FastAPI:
    """The server; what it is sent goes to `received`."""
    app = FastAPI()

    @app.post("/graphql")
    async def graphql(request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"data": received.answer(body["operationName"], body.get("variables") or {})}

    @app.post("/files/{entity}/{project}/{run}/file_stream")
    async def file_stream(request: Request) -> dict[str, Any]:
        received.stream(await request.json())
        return {"exitcode": None, "limits": {}}

    @app.put("/upload/{name:path}")
    async def upload(name: str, request: Request) -> dict[str, Any]:
        received.files[name] = await request.body()
        return {}

    return app
