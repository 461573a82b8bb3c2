"""The routes over a real server, through ASGI without a socket; who is let in, and what is answered."""

import re
from collections.abc import AsyncIterator
from functools import partial

import httpx
import pytest

from millstream.broker.connection import Control, open_control
from millstream.broker.registry import Registry
from millstream.config import Settings
from millstream.dashboard.app import FILES, make_app
from millstream.dashboard.feed import Feed
from millstream.dashboard.reading import look
from tests.dashboard.seeding import MODEL, REASON, seed_shop

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]
BASE = "http://127.0.0.1:8265"


def make_client(redis: Control, settings: Settings) -> httpx.AsyncClient:
    app = make_app(Feed(settings, partial(look, redis, settings)), Registry(redis, settings))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE)


@pytest.fixture
async def http(redis: Control, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with make_client(redis, settings) as client:
        yield client


@pytest.fixture
async def offline() -> AsyncIterator[httpx.AsyncClient]:
    """An application whose server is not there: for what needs none."""
    settings = Settings("redis://127.0.0.1:1")
    control = open_control(settings, "test")
    async with make_client(control, settings) as client:
        yield client
    await control.aclose()


async def test_snapshot_is_what_is_in_redis(http: httpx.AsyncClient, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)

    answer = await http.get("/api/snapshot")

    assert answer.status_code == 200
    body = answer.json()
    assert (body["error"], body["age_s"] < 1.0) == ("", True)
    names = {d["tag"]: d["status"] for d in body["snapshot"]["deployments"]}
    assert names == {"shop.Gate": "HEALTHY", "shop.Model": "UPSCALING", "shop.Broken": "DEPLOY_FAILED"}


async def test_decisions_come_newest_first_with_reason_and_inputs(
    http: httpx.AsyncClient, redis: Control, settings: Settings
) -> None:
    await seed_shop(redis, settings)

    newest, first = (await http.get(f"/api/deployments/{MODEL}/decisions")).json()["decisions"]

    assert (newest["was"], newest["target"], newest["reason"], newest["by"]) == (1, 3, REASON, "a1b2c3d4")
    assert newest["inputs"] == {"waiting": "40", "arrivals_per_s": "12.0"}
    assert (first["was"], first["target"]) == (None, 1)


async def test_number_of_decisions_can_be_limited(http: httpx.AsyncClient, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)

    answer = await http.get(f"/api/deployments/{MODEL}/decisions?limit=1")

    assert len(answer.json()["decisions"]) == 1


@pytest.mark.parametrize("limit", ["0", "201", "-1", "many", "1e3", "²"])
async def test_limit_out_of_range_is_refused(http: httpx.AsyncClient, limit: str) -> None:
    answer = await http.get("/api/deployments/shop.Model/decisions", params={"limit": limit})

    assert answer.status_code == 400
    assert "from 1 to 200" in answer.json()["error"]


@pytest.mark.parametrize("tag", ["shop.Nothing", "nothing", "shop.Model}:other{", "%2e%2e"])
async def test_unknown_deployment_is_not_found(
    http: httpx.AsyncClient, redis: Control, settings: Settings, tag: str
) -> None:
    await seed_shop(redis, settings)

    answer = await http.get(f"/api/deployments/{tag}/decisions")

    assert answer.status_code == 404


async def test_unreachable_server_is_503_with_the_reason(offline: httpx.AsyncClient) -> None:
    for path in ("/api/snapshot", "/api/deployments/shop.Model/decisions"):
        answer = await offline.get(path)

        assert answer.status_code == 503
        assert "server" in answer.json()["error"]


async def test_health_is_this_process_s_own(offline: httpx.AsyncClient) -> None:
    assert (await offline.get("/healthz")).json() == {"status": "ok"}


@pytest.mark.parametrize("name", sorted(FILES))
async def test_page_and_its_files_are_served(offline: httpx.AsyncClient, name: str) -> None:
    answer = await offline.get("/" if name == "index.html" else f"/{name}")

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(FILES[name])


@pytest.mark.parametrize("path", ["/", "/api/snapshot", "/nowhere"])
async def test_every_answer_forbids_foreign_content(offline: httpx.AsyncClient, path: str) -> None:
    headers = (await offline.get(path)).headers

    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("name", sorted(FILES))
async def test_page_loads_nothing_from_elsewhere(offline: httpx.AsyncClient, name: str) -> None:
    text = (await offline.get("/" if name == "index.html" else f"/{name}")).text

    assert set(re.findall(r"\w*:?//\w[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert "innerHTML" not in text


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8265", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8265", "LOCALHOST:8265"]
)
async def test_loopback_hosts_are_let_in(offline: httpx.AsyncClient, host: str) -> None:
    assert (await offline.get("/healthz", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8265", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "::1",
     "localhost:", "localhost:x", "127.0.0.1:8265:1", "10.0.0.1:8265", "evil.example@localhost"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/api/snapshot", "/api/live", "/healthz", "/nowhere"])
async def test_other_hosts_are_refused_everywhere(offline: httpx.AsyncClient, path: str, host: str) -> None:
    answer = await offline.get(path, headers={"host": host})

    assert answer.status_code == 403
    assert "loopback" in answer.json()["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "PURGE"])
@pytest.mark.parametrize("path", ["/", "/api/snapshot", "/api/live", "/api/deployments/shop.Model/decisions"])
async def test_anything_but_get_is_refused(offline: httpx.AsyncClient, path: str, method: str) -> None:
    answer = await offline.request(method, path)

    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
