import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve.answers import AnswerCounter


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
