"""Fixtures for the tests of applications. `serve_local` serves in local mode, for one test: see docs/testing.md.

Nothing of millstream is loaded before a test asks for one of them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from millstream.broker.registry import Registry
    from millstream.config import Settings
    from millstream.deployment import Application
    from millstream.handles.handle import DeploymentHandle, SyncHandle

PATIENCE_S = 1.0  # for what a test leaves running: it must not hold up the next one
_private: set[str] = set()  # the servers that are ours alone


class ServeLocal:
    """Serves applications in local mode until the end of the test. Code under test may call `serve.run`: it does the same."""

    def __call__(self, target: "Application", *, name: str = "default", timeout_s: float | None = None) -> "SyncHandle":
        """As `serve.run(target, local=True)`: the blocking handle of the ingress."""
        from millstream import serve

        return serve.run(target, name=name, timeout_s=timeout_s, local=True)

    async def run_async(
        self, target: "Application", *, name: str = "default", timeout_s: float | None = None
    ) -> "DeploymentHandle":
        """The same for tests that are coroutines: does not block the loop, and returns the asynchronous handle."""
        import asyncio

        from millstream.handles.handle import DeploymentHandle

        ingress = await asyncio.to_thread(self, target, name=name, timeout_s=timeout_s)
        return DeploymentHandle(ingress.deployment_name, ingress.app_name)


@pytest.fixture(scope="session")
def millstream_server() -> Iterator["Settings"]:
    """A private temporary server for the tests of this process: with pytest-xdist, each worker has its own.

    Override it in conftest.py to return the `Settings` of another one; what lies there is then not removed between tests.
    """
    from millstream.runtime import load_local_mode
    from millstream.tree import Tree

    tree = Tree()
    settings = tree.start_server(None, meanwhile=load_local_mode)
    _private.add(settings.url)
    yield settings
    tree.close()


@pytest.fixture
def serve_local(millstream_server: "Settings", monkeypatch: pytest.MonkeyPatch) -> Iterator[ServeLocal]:
    """Serve an application for one test: `handle = serve_local(App.bind())`, or `await serve_local.run_async(App.bind())`.

    The test begins with an empty server. When it is over, what it has served is deleted. Where a fixture of wider scope
    has chosen a server already, that is used, and what is served there stays.
    """
    from millstream import runtime
    from millstream.handles import engines

    monkeypatch.setenv("MILLSTREAM_LOCAL", "1")
    is_first = not runtime.is_initialized()
    if is_first:
        server = millstream_server
        runtime.init(server.url, namespace=server.namespace, secret_key=server.secret_key)
        if server.url in _private:
            runtime.with_registry(_wipe)
    settings, kept = engines.settings(), runtime.with_registry(_names)
    try:
        yield ServeLocal()
    finally:
        try:
            if runtime.is_initialized() and engines.settings() == settings:
                _delete_all_but(kept)
        finally:
            if is_first:
                runtime.shutdown()


async def _names(registry: "Registry") -> set[str]:
    return set(await registry.apps())


async def _wipe(registry: "Registry") -> None:
    for prefix in (registry.settings.namespace, f"{{{registry.settings.namespace}"):
        keys = [key async for key in registry.client.scan_iter(f"{prefix}:*", count=1000)]
        if keys:
            await registry.client.unlink(*keys)


def _delete_all_but(kept: set[str]) -> None:
    from millstream import runtime, serve

    node = runtime.local_node()
    if node is not None:
        node.patience_s = PATIENCE_S
    for name in runtime.with_registry(_names) - kept:
        serve.delete(name)
    if node is not None:
        node.patience_s = None
