"""Real replicas on a real server, in the test's own process: no launcher, no autoscaler, no fork.

`Hosted` is one replica on the running loop, `Serving` deploys and serves on a loop in a thread of its own, so that a test
may block. Both speak to the replica as a launcher does.
"""

import asyncio
import contextlib
import itertools
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from millstream.broker import pickling, scripts
from millstream.broker.cluster import ClusterLink
from millstream.broker.codec import codec_for
from millstream.broker.connection import Control as Client
from millstream.broker.connection import open_control, run
from millstream.broker.definitions import Definition
from millstream.broker.keys import Keys, deployment_tag
from millstream.broker.link import Link
from millstream.broker.outcomes import open_stored
from millstream.broker.records import AppRecord, NewDeployment
from millstream.broker.registry import Registry
from millstream.config import Settings
from millstream.deployment import Application, Node, compile_graph, deployment
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.replicas.control import Control
from millstream.replicas.replica import Birth, Replica
from tests.helpers import nodes_of
from tests.servers import CLUSTER, chosen_servers

T = TypeVar("T")
APP = "app"
NODE = "node"
GRACE_S = 2.0  # for draining: what a test leaves running must not hold up the next one
PATIENCE_S = 10.0

_numbers = itertools.count(1)


def keep_one_server(config: pytest.Config, items: list[pytest.Item], folder: Path) -> None:
    """Run the tests of a folder on one of the chosen servers only: what differs between them is tested in `broker`.

    A cluster is another matter: it is never dropped.
    """
    dropped = {item for item in items if item.path.is_relative_to(folder) and not _is_kept(config, item)}
    if dropped:
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=list(dropped))


def _is_kept(config: pytest.Config, item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    if callspec is None or "server" not in callspec.params:
        return True
    chosen = chosen_servers(config)
    server: str = callspec.params["server"]
    return server in (CLUSTER, next((name for name in ("valkey", "redis8", "redis7") if name in chosen), chosen[0]))


def to_node(target: Any, *args: Any, **options: Any) -> Node:
    """A class or function, as `serve.run` compiles it."""
    (node,) = compile_graph(deployment(**options)(target).bind(*args), APP)
    return node


async def deploy(settings: Settings, nodes: list[Node], app: str = APP) -> AppRecord:
    """Store an application as `serve.run` does; its definitions stay empty, because `Hosted` is given them."""
    async with open_control(settings, "test") as client:
        new = [NewDeployment(node.name, node.config, b"") for node in nodes]
        return await Registry(client, settings).deploy(app, nodes[0].name, new)


class Hosted:
    """One replica on the running loop, and the launcher's end of its socket."""

    def __init__(self, settings: Settings, node: Node, *, app: str = APP, name: str = "", version: str = "v") -> None:
        ours, theirs = socket.socketpair()
        self.name = name or f"r-{next(_numbers)}"
        self.tag = deployment_tag(app, node.name)
        birth = Birth(self.tag, self.name, NODE, version, node.config)
        definition = Definition(node.deployment.func_or_class, node.args, node.kwargs)
        self.replica = Replica(settings, birth, definition, Control(theirs))
        self.control = Control(ours)
        self.heard: list[dict[str, Any]] = []  # what it has told its launcher
        self._sockets = (ours, theirs)
        self._life: asyncio.Task[int] | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> "Hosted":
        """Start it and wait until it is ready."""
        self.begin()
        await self.hears("ready")
        return self

    def begin(self) -> None:
        self._life = asyncio.create_task(self.replica.run())
        self._listening = asyncio.create_task(self._listen())

    async def hears(self, word: str) -> dict[str, Any]:
        """The next message with this word, or the one that came already."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for message in self.heard:
                    if word in message:
                        return message
                assert self._life is not None and not self._life.done(), f"it ended before it said {word!r}"
                await asyncio.sleep(0.002)

    async def drain(self) -> int:
        """Tell it to drain; its exit code."""
        await self.control.send({"drain": True})
        return await self.end()

    async def orphan(self) -> int:
        """Close its launcher's end; its exit code."""
        self._sockets[0].shutdown(socket.SHUT_RDWR)
        return await self.end()

    async def end(self) -> int:
        """Wait for its end; its exit code. Raises what its process would die of."""
        assert self._life is not None and self._listening is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._life
        finally:
            self._listening.cancel()
            await asyncio.wait([self._listening])
            self.hang_up()

    def hang_up(self) -> None:
        """Close both ends. Twice is as once."""
        for sock in self._sockets:
            sock.close()

    @property
    def is_over(self) -> bool:
        return self._life is None or self._life.done()

    async def _listen(self) -> None:
        async for message in self.control.messages():
            self.heard.append(message)


class Stage:
    """One deployment, `app.Model`, with its replicas on the running loop, and means to look at what they do."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = Keys(settings.namespace).deployment(deployment_tag(APP, "Model"))
        self.handle = DeploymentHandle("Model", APP)
        self._codec = codec_for(settings.secret_key, settings.namespace, self.keys.tag)
        self._version = ""
        self._hosted: list[Hosted] = []

    async def start(self, target: Any, *args: Any, name: str = "", **options: Any) -> Hosted:
        """Start a replica and wait until it is ready. The first one also deploys."""
        hosted = await self.prepare(target, *args, name=name, **options)
        return await hosted.start()

    async def prepare(self, target: Any, *args: Any, name: str = "", **options: Any) -> Hosted:
        """As `start`, without starting it."""
        node = to_node(target, *args, **{"name": "Model", "graceful_shutdown_timeout_s": GRACE_S, **options})
        if not self._version:
            self._version = (await deploy(self.settings, [node])).version
        self._hosted.append(Hosted(self.settings, node, name=name, version=self._version))
        return self._hosted[-1]

    async def submit(self, client: Client, *calls: Any, lane: str = "normal", method: str = "__call__") -> list[str]:
        """Submit one call per argument in one script, without an engine; their refs. Nobody hears of the results."""

        def seal(ref: bytes, argument: Any) -> bytes:
            return self._codec.seal("request", ref, pickling.dump(((argument,), {}), "a call"), method.encode())

        return await self._submit(client, calls, lane, method, seal)

    async def submit_json(self, client: Client, *calls: list[Any], method: str = "__call__") -> list[str]:
        """As `submit`, as a caller in another language does it; each call is a list of arguments."""

        def seal(ref: bytes, arguments: Any) -> bytes:
            return self._codec.seal_json("request", ref, [arguments, {}], method.encode())

        return await self._submit(client, calls, "normal", method, seal)

    async def _submit(
        self, client: Client, calls: Sequence[Any], lane: str, method: str, seal: Callable[[bytes, Any], bytes]
    ) -> list[str]:
        refs = [secrets.token_hex(11) for _ in calls]
        batch: list[Any] = []
        for ref, arguments in zip(refs, calls, strict=True):
            batch += [ref.encode(), lane, method.encode(), "", seal(ref.encode(), arguments)]
        await run(client, scripts.submit(self.keys, "", batch))
        return refs

    async def read(self, client: Client, ref: str) -> Any:
        """The value of a request that has ended, or its error raised."""
        stored: Any = await client.get(self.keys.result(ref))
        return open_stored(self._codec, ref.encode(), stored)

    async def drain(self) -> None:
        """Drain those that are not over."""
        for one in self._hosted:
            if not one.is_over:
                await one.drain()
            one.hang_up()


class Serving:
    """Deploys and serves. Call it with a class or function and the options of its deployment; it returns a handle."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._apps = 0
        self._hosted: list[Hosted] = []
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.complaints: list[dict[str, Any]] = []  # what the loop's exception handler was told
        started = threading.Event()
        self._thread = threading.Thread(target=self._live, args=[started], name="stage")
        self._thread.start()
        assert started.wait(PATIENCE_S)

    def __call__(self, target: Any, *args: Any, replicas: int = 1, **options: Any) -> DeploymentHandle:
        """Serve `target`, constructed with `args`, on so many replicas. The first one's application is `app`."""
        node = to_node(target, *args, **{"graceful_shutdown_timeout_s": GRACE_S, **options})
        app = self._new_app()
        self.run(self._serve([node], replicas, app))
        return DeploymentHandle(node.name, app)

    def sync(self, target: Any, *args: Any, **options: Any) -> SyncHandle:
        """As calling it; a blocking handle."""
        handle = self(target, *args, **options)
        return SyncHandle(handle.deployment_name, handle.app_name)

    def graph(self, application: Application) -> DeploymentHandle:
        """Serve a bound graph, one replica for each deployment; the handle of its ingress."""
        app = self._new_app()
        nodes = compile_graph(application, app)
        self.run(self._serve(nodes, 1, app))
        return DeploymentHandle(nodes[0].name, app)

    def deploy_only(self, target: Any, **options: Any) -> DeploymentHandle:
        """Deploy, and start no replica: requests stay queued."""
        return self(target, replicas=0, **options)

    def start_replica(self, handle: DeploymentHandle, target: Any, *args: Any, **options: Any) -> Hosted:
        """One more replica of what was deployed before."""
        options = {"graceful_shutdown_timeout_s": GRACE_S, **options}
        node = replace(to_node(target, *args, **options), name=handle.deployment_name)
        return self.run(self._start(node, handle.app_name, "v"))

    def drain(self) -> None:
        """Drain all replicas, and wait for their ends."""
        self.run(self._drain())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the loop of the replicas, and block for what it returns."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(PATIENCE_S * 2)

    def close(self) -> None:
        try:
            self.drain()
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(PATIENCE_S)
        assert self.complaints == [], self.complaints

    def _new_app(self) -> str:
        """Two deployments served one after the other are two applications: deploying one again would replace it."""
        self._apps += 1
        return APP if self._apps == 1 else f"{APP}{self._apps}"

    async def _serve(self, nodes: list[Node], replicas: int, app: str) -> None:
        record = await deploy(self._settings, nodes, app)
        for node in nodes:
            for _ in range(replicas):
                await self._start(node, app, record.version)

    async def _start(self, node: Node, app: str, version: str) -> Hosted:
        hosted = Hosted(self._settings, node, app=app, version=version)
        self._hosted.append(hosted)
        await hosted.start()
        async with open_control(self._settings, "test") as client:  # as a launcher does, who would renew it
            await client.set(Keys(self._settings.namespace).deployment(hosted.tag).lease(hosted.name), NODE, ex=600)
        return hosted

    async def _drain(self) -> None:
        hosted, self._hosted = self._hosted, []
        for one in hosted:
            await one.control.send({"drain": True})
        for one in hosted:
            await one.end()

    def _live(self, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._until_stopped(started))

    async def _until_stopped(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        started.set()
        await self._stop.wait()


class Gate:
    """Holds requests up until the test opens it. From any thread and loop."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._lock = threading.Lock()
        self.inside = 0  # so many requests wait at it
        self.most = 0
        self.passed = 0

    def open(self) -> None:
        self._is_open.set()

    async def wait(self) -> None:
        with self._counted():
            while not self._is_open.is_set():  # noqa: ASYNC110 - it is opened in another thread
                await asyncio.sleep(0.001)

    def wait_in_thread(self) -> None:
        with self._counted():
            assert self._is_open.wait(PATIENCE_S)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
                self.passed += 1


async def connections(client: Client, *prefixes: str) -> list[tuple[Client, str]]:
    """The connections whose names start so: a client of the server that has it, and its id there."""
    return [
        (node, row["id"])
        for node in await nodes_of(client)
        for row in await node.client_list()
        if row["name"].startswith(prefixes)
    ]


async def cut(client: Client, *prefixes: str) -> int:
    """Cut every connection whose name starts so, from the server's side; how many."""
    found = await connections(client, *prefixes)
    for node, one in found:
        await node.client_kill_filter(_id=one)
    return len(found)


def wires(link: Link | None) -> list[Link]:
    """The connections of a link: into a cluster, one to each primary."""
    assert link is not None
    return list(link._links.values()) if isinstance(link, ClusterLink) else [link]
