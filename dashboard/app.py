"""The routes: one page, its JSON, and one stream of snapshots. GET only, for this machine's own browser only."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import asdict
from importlib import resources
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millstream.broker.connection import DOWN
from millstream.broker.registry import Registry
from millstream.dashboard.feed import READ_TIMEOUT_S, Feed
from millstream.dashboard.snapshot import Decision

# The names by which a browser on this machine reaches us. Any other Host means that a foreign name was pointed at
# 127.0.0.1, to read this page from a web site (DNS rebinding).
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
MOST_DECISIONS = 200
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


def make_app(feed: Feed, registry: Registry, hosts: Collection[str] = LOOPBACK_HOSTS) -> Starlette:
    """The application. `hosts` are the accepted values of the Host header, without port."""

    async def snapshot(_: Request) -> Response:
        latest = await feed.latest()
        return JSONResponse(latest.to_dict(), 503 if latest.error else 200)

    async def live(_: Request) -> Response:
        return StreamingResponse(_events(feed), media_type="text/event-stream")

    async def decisions(request: Request) -> Response:
        try:
            with anyio.fail_after(READ_TIMEOUT_S):
                return await _decisions(registry, request.path_params["tag"], request.query_params.get("limit", "20"))
        except (*DOWN, TimeoutError) as e:
            return _error(503, f"the server does not answer: {e or 'timeout'}")

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})  # of this process; whether Redis answers is what the page is about

    return Starlette(
        routes=[
            Route("/", _file("index.html")),
            *(Route(f"/{name}", _file(name)) for name in FILES if name != "index.html"),
            Route("/api/snapshot", snapshot),
            Route("/api/live", live),
            Route("/api/deployments/{tag}/decisions", decisions),
            Route("/healthz", healthz),
        ],
        middleware=[Middleware(Gate, hosts=frozenset(hosts))],
    )


class Gate:
    """Lets in GET requests that name a loopback host, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        answer = self._refusal(Request(scope)) or self._app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if _without_port(host) not in self._hosts:
            return _error(403, f"host {host!r} is not this machine's loopback; open http://127.0.0.1:<port>/ here")
        if request.method != "GET":
            response = _error(405, "the dashboard is read-only: GET is all it takes")
            response.headers["allow"] = "GET"
            return response
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    body = resources.files("millstream.dashboard").joinpath("static", name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(body, media_type=FILES[name])

    return answer


async def _decisions(registry: Registry, tag: str, limit: str) -> Response:
    if not limit.isdecimal() or not 1 <= int(limit) <= MOST_DECISIONS:
        return _error(400, f"limit={limit!r} must be a number from 1 to {MOST_DECISIONS}")
    if not any(tag in app.tags for app in (await registry.apps()).values()):
        return _error(404, f"no deployment {tag!r}; a tag is written app.deployment, and /api/snapshot lists them")
    records = await registry.decisions(tag, int(limit))
    return JSONResponse({"decisions": [asdict(Decision.from_record(record)) for record in records]})


async def _events(feed: Feed) -> AsyncIterator[str]:
    """A snapshot at once, and one each `poll_s`, as long as the client listens."""
    yield "retry: 2000\n\n"
    while not feed.closed.is_set():
        yield f"data: {_dumps((await feed.latest()).to_dict())}\n\n"
        with anyio.move_on_after(feed.poll_s):
            await feed.closed.wait()


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)
