"""The page in a real browser, over a real dashboard and server: what a reader sees, and what they can do."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from anyio import to_thread

from millstream.broker.connection import Control
from millstream.broker.registry import Registry
from millstream.config import Settings
from tests.dashboard.browser import Page, open_browser
from tests.dashboard.seeding import BROKEN, GATE, MODEL, REASON, decide, seed_shop
from tests.dashboard.serving import serve_dashboard
from tests.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.processes, pytest.mark.any_server]
ROWS = "document.querySelectorAll('#rows > .row').length"
DECISIONS = f"[...document.querySelectorAll('.decisions li')].some(line => line.innerText.includes({REASON!r}))"


@dataclass
class Reader:
    """A page, used from a thread: the dashboard lives on our loop."""

    page: Page
    url: str = ""

    async def open(self, path: str = "/") -> None:
        await to_thread.run_sync(self.page.open, self.url + path)

    async def see(self, script: str, timeout_s: float = 10.0) -> Any:
        return await to_thread.run_sync(self.page.wait_for, script, timeout_s)

    async def run(self, script: str) -> Any:
        return await to_thread.run_sync(self.page.run, script)

    async def read(self) -> str:
        text: str = await to_thread.run_sync(lambda: self.page.text)
        return text

    async def see_text(self, text: str, timeout_s: float = 10.0) -> None:
        await self.see(f"document.body.innerText.includes({text!r})", timeout_s)


@pytest.fixture(scope="module")
def browser() -> Any:
    with open_browser() as page:
        yield page


@pytest.fixture
async def reader(browser: Page, settings: Settings) -> AsyncIterator[Reader]:
    async with serve_dashboard(settings) as http:
        browser.resize(1280, 900)
        yield Reader(browser, str(http.base_url).rstrip("/"))
        browser.open("about:blank")  # its stream ends with its page


def cells(tag: str) -> str:
    return f"[...document.querySelectorAll('[data-tag=\"{tag}\"] > *')].map(cell => cell.innerText.trim())"


async def test_table_shows_what_is_in_redis(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)

    await reader.open()
    await reader.see(f"{ROWS} === 3")

    name, status, *numbers, replicas, chart = await reader.run(cells(MODEL))
    assert name.split() == ["Model", "shop"]
    assert status == "Upscaling"
    assert numbers[:4] == ["7", "3", "1", "2"]
    assert numbers[-1].endswith("s")
    assert replicas == "1 / 3 1–8"
    assert chart == ""
    assert (await reader.run(cells(GATE)))[1] == "Healthy"
    assert (await reader.run(cells(BROKEN)))[1] == "Deploy failed"


async def test_overview_names_server_node_and_leader(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)

    await reader.open()
    await reader.see(f"{ROWS} === 3")

    overview = await reader.run("document.getElementById('overview').innerText")
    assert "mill-1 (4)" in overview and "a1b2c3d4" in overview and "7 waiting" in overview
    assert "noeviction" in overview and "append-only file off" in overview


async def test_row_opens_by_keyboard_to_replicas_and_decisions(
    reader: Reader, redis: Control, settings: Settings
) -> None:
    await seed_shop(redis, settings)
    await reader.open()
    await reader.see(f"{ROWS} === 3")

    for key in ("Tab", "Tab", "Tab", "Enter"):  # Pause, Gate, Model
        await to_thread.run_sync(reader.page.press, key)

    await reader.see(DECISIONS)
    detail = await reader.run("document.querySelector('.detail').innerText")
    assert "1 → 3" in detail and "new → 1" in detail
    assert "waiting 40 · arrivals per s 12.0" in detail
    assert "m1" in detail and "Starting" in detail and "mill-1" in detail and "5000" in detail
    assert await reader.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert await reader.run("location.hash") == f"#{MODEL}"


async def test_opened_row_is_in_the_address(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)

    await reader.open(f"/#{MODEL}")

    await reader.see(DECISIONS)


async def test_what_users_wrote_is_text_never_markup(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)

    await reader.open(f"/#{BROKEN}")

    await reader.see_text("Cannot start: its constructor raised <b>ValueError</b>")
    await reader.see_text("Traceback: <script>x()</script>")
    assert await reader.run("document.querySelectorAll('main script, main b > b').length") == 0


async def test_page_follows_a_new_decision(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    await reader.open(f"/#{MODEL}")
    await reader.see(DECISIONS)

    await decide(redis, settings, 1, MODEL, 6, "much more to do", was=3)

    await reader.see("document.querySelector('.decisions').innerText.includes('3 → 6')")
    assert (await reader.run(cells(MODEL)))[9] == "1 / 6 1–8"


async def test_deployment_that_is_deleted_disappears(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    await reader.open()
    await reader.see(f"{ROWS} === 3")
    registry = Registry(redis, settings)

    await registry.client.hdel(registry.keys.apps, "shop")

    await reader.see_text("Nothing is deployed yet")


async def test_chart_grows_with_each_look(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    await reader.open()

    await reader.see(
        f"(document.querySelector('[data-tag=\"{MODEL}\"] .waiting')?.getAttribute('d') ?? '').includes('L')"
    )

    label = await reader.run(f"document.querySelector('[data-tag=\"{MODEL}\"] svg').getAttribute('aria-label')")
    assert label == "last 5 minutes: 7 waiting now, 7 at most; 1 replicas now"


async def test_empty_installation_says_what_to_do(reader: Reader) -> None:
    await reader.open()

    await reader.see_text("millstream run module:app")
    assert "Nothing is deployed yet" in await reader.read()


async def test_pause_stops_the_reading_until_resumed(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    await reader.open()
    await reader.see(f"{ROWS} === 3")

    await reader.run("document.getElementById('pause').click()")
    await decide(redis, settings, 1, MODEL, 6, "much more to do", was=3)
    await reader.see(
        "/paused, data ([2-9]|[1-9]\\d)/.test(document.body.innerText)"
    )  # seconds: longer than it waits between two readings
    paused = await reader.run(cells(MODEL))
    await reader.run("document.getElementById('pause').click()")

    assert paused[9] == "1 / 3 1–8"
    await reader.see_text("1 / 6")


@pytest.mark.parametrize("width", [390, 820, 1280])
async def test_nothing_is_cut_off(reader: Reader, redis: Control, settings: Settings, width: int) -> None:
    await seed_shop(redis, settings)
    reader.page.resize(width, 800)

    await reader.open(f"/#{MODEL}")
    await reader.see(DECISIONS)

    assert await reader.run("document.documentElement.scrollWidth") <= width


async def test_page_breaks_no_rule_of_its_own_policy(reader: Reader, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    script = "addEventListener('securitypolicyviolation', e => (window.violations ??= []).push(e.violatedDirective))"
    await to_thread.run_sync(reader.page.run_before_each_page, script)

    await reader.open(f"/#{MODEL}")
    await reader.see(DECISIONS)

    assert await reader.run("window.violations ?? []") == []


async def test_banner_while_the_server_is_away_and_recovery_by_itself(
    browser: Page, start_server: Callable[..., Server]
) -> None:
    server = start_server("--appendonly", "yes")
    settings = Settings(server.url, secret_key=b"a secret for tests")
    async with server.connect() as client:
        await seed_shop(client, settings)

    async with serve_dashboard(settings) as http:
        reader = Reader(browser, str(http.base_url).rstrip("/"))
        await reader.open()
        await reader.see(f"{ROWS} === 3")
        server.kill()
        await reader.see("!document.getElementById('banner').hidden")
        banner = await reader.run("document.getElementById('banner').innerText")
        rows = await reader.run(ROWS)
        server.start()
        await reader.see("document.getElementById('banner').hidden")
        browser.open("about:blank")

    assert "Cannot reach the server" in banner and "What you see was true" in banner
    assert rows == 3


async def test_page_says_that_the_dashboard_itself_is_gone(browser: Page, redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    async with serve_dashboard(settings) as http:
        reader = Reader(browser, str(http.base_url).rstrip("/"))
        await reader.open()
        await reader.see(f"{ROWS} === 3")

    await reader.see_text("The dashboard does not answer", timeout_s=15.0)
    browser.open("about:blank")
