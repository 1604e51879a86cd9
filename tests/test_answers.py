import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from aurora.config import AuroraConfig
from serve.admission import Admission
from serve.answers import AnswerCounter
from serve.history import History
from serve.http import guard


@pytest.fixture
def told():
    return []


@pytest.fixture
def client(told):
    async def answer(request: Request) -> JSONResponse:
        if request.path_params["code"] == 0:
            raise RuntimeError("broken")
        return JSONResponse({}, request.path_params["code"])

    app = Starlette(routes=[Route("/{code:int}", answer)])
    return TestClient(AnswerCounter(app, told.append), raise_server_exceptions=False)


def test_every_answer_is_counted_by_its_status(client, told):
    assert [client.get(f"/{code}").status_code for code in (200, 503, 0)] == [200, 503, 500]
    assert client.get("/nowhere").status_code == 404
    assert told == [200, 503, 500, 404]


def test_a_guarded_application_counts_what_never_reaches_it(told):
    app, admission = FastAPI(), Admission(1)
    admission.on_answer = told.append

    @app.post("/v1/answer")
    async def answer() -> dict[str, str]:
        return {}

    guard(app, AuroraConfig(), ["key"], admission, History(CollectorRegistry()))
    client = TestClient(app)
    with_key = {"Authorization": "Bearer key"}
    client.post("/v1/answer")
    client.post("/v1/answer", headers=with_key)
    admission.places = 0
    client.post("/v1/answer", headers=with_key)
    assert told == [401, 200, 503]
