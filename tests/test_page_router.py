"""The page behind a router: what it says of the fleet, and of each replica, in a real browser where there is one."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve import page
from serve.access import PAGE_DATA_PATH
from serve.fleet import Fleet
from serve.history import COUNTS, GAUGES, Hour, Point, Swap
from serve.router import RouterApp
from tests.browser import browser
from tests.local_http import serving

INNER = "inner"
BEGAN_S = time.time() - 300


def _hour(emitted: int, speed_up: float, version: int, domain: str) -> Hour:
    """Five minutes of one replica, which has been busy until a while ago."""
    points = [
        Point(
            time_s=BEGAN_S + 5.5 * i,
            speed_up=speed_up,
            tokens_per_s=emitted / 4.0,
            acceptance_length=2.0,
            emitted=emitted,
            plain_s=4.0 * speed_up,
            measured_s=4.0,
            draft_steps=10,
            accepted=10,
            domains={domain: [100, 50]},
            sources={"target": emitted},
            version=version,
        )
        for i in range(40)
    ]
    swaps = [Swap(BEGAN_S + 60, "eagle3", version - 1, version)]
    state: dict[str, float | None] = dict.fromkeys(name.removeprefix("aurora_") for name in (*GAUGES, *COUNTS))
    state |= {"swaps_total": 1.0, "trainer_alive": 1.0, "training_share": 0.5, "drift": 0.0}
    return Hour(time.time(), points, swaps, [], {"eagle3": version}, state, {})


class Replica:
    """Plays a server: its page, and data that want the inner key."""

    def __init__(self, hour: Hour) -> None:
        self.hour = hour
        self.broken = False

    async def look(self) -> None:
        """Nothing is new."""

    def since(self, time_s: float) -> Hour:
        points = [point for point in self.hour.points if point.time_s > time_s]
        return Hour(time.time(), points, self.hour.swaps, [], self.hour.live, self.hour.state, {})

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, follow: Any) -> Response:
            if request.url.path == PAGE_DATA_PATH:
                assert request.headers["authorization"] == f"Bearer {INNER}"
                if self.broken:
                    return Response("no JSON")
            answer: Response = await follow(request)
            return answer

        page.install(app, self)
        return app


@pytest.fixture
def fleet() -> Iterator[SimpleNamespace]:
    replicas = [Replica(_hour(40, 1.0, 3, "sql")), Replica(_hour(80, 2.0, 4, "tax"))]
    behind = Fleet("round_robin")
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(replica.app())) for replica in replicas]

        @asynccontextmanager
        async def life(_app: FastAPI) -> AsyncIterator[None]:
            async with router:
                for number, url in enumerate(urls):
                    await behind.join(f"server-{number}", url, places=8)
                yield

        router = RouterApp(behind, INNER)
        app = FastAPI(lifespan=life, openapi_url=None)
        app.mount("/", router)
        yield SimpleNamespace(url=stack.enter_context(serving(app)), replicas=replicas)


def _data(fleet: SimpleNamespace, **query: object) -> dict[str, Any]:
    answer = httpx.get(f"{fleet.url}{PAGE_DATA_PATH}", params={**query}, timeout=30)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


def test_the_router_adds_its_replicas_up(fleet: SimpleNamespace) -> None:
    data = _data(fleet)
    assert data["replicas"] == {"server-0": {"eagle3": 3}, "server-1": {"eagle3": 4}}
    assert sum(point["emitted"] for point in data["points"]) == 40 * (40 + 80)
    assert {point["speed_up"] for point in data["points"][1:-1]} == {1.5}
    assert {point["tokens_per_s"] for point in data["points"][1:-1]} == {30.0}
    assert [swap["replica"] for swap in data["swaps"]] == ["server-0", "server-1"]
    assert data["state"]["swaps_total"] == 2
    last = data["points"][-3]["time_s"]
    assert _data(fleet, since=last)["points"] == data["points"][-2:]


def test_one_replica_can_be_looked_at(fleet: SimpleNamespace) -> None:
    data = _data(fleet, replica="server-1")
    assert (data["replica"], len(data["points"]), data["points"][0]["speed_up"]) == ("server-1", 40, 2.0)
    assert _data(fleet, replica="server-7")["replica"] == ""
    assert _data(fleet, replica="server-1", since="x")["points"] == data["points"]


def test_a_replica_that_says_nonsense_is_away(fleet: SimpleNamespace) -> None:
    fleet.replicas[0].broken = True
    data = _data(fleet, replica="server-0")
    assert data["replicas"] == {"server-0": None, "server-1": {"eagle3": 4}}
    assert (data["replica"], {point["speed_up"] for point in data["points"]}) == ("", {2.0})


def test_the_page_shows_the_fleet_or_one_of_it(fleet: SimpleNamespace) -> None:
    with browser() as chromium:
        tab = chromium.new_page()
        wrong: list[str] = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        tab.goto(f"{fleet.url}/aurora")
        tab.locator("#connection.live").wait_for()
        assert "server-0: 3, server-1: 4" in tab.locator("#cards").inner_text()
        assert "NaN" not in tab.locator("#cards").inner_text()
        assert "2 of 2 answer" in tab.locator("#cards").inner_text()
        assert "1.50 at last" in tab.locator("#speed svg").get_attribute("aria-label")
        assert "server-1" in tab.locator("#versions tbody").inner_text()
        tab.get_by_label("Show").select_option("server-1")
        tab.locator("#speed svg[aria-label*='2.00 at last']").wait_for()
        assert "sql" not in tab.locator("#domains").inner_text()
        assert len(tab.locator("#speed polyline").get_attribute("points").split()) == 40
        fleet.replicas[1].broken = True
        tab.locator("#speed svg[aria-label*='1.00 at last']").wait_for()
        assert tab.get_by_label("Show").input_value() == "", "back to those that answer"
        assert "1 of 2 answer" in tab.locator("#cards").inner_text()
        assert wrong == []
