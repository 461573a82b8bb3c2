"""The composition root: which server this process uses, and what it starts where something is missing."""

import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from millstream.broker.connection import open_control
from millstream.broker.registry import Registry, connect_registry
from millstream.config import Settings, find_settings
from millstream.errors import BrokerUnavailableError
from millstream.handles import engines
from millstream.tree import Tree

T = TypeVar("T")

_lock = threading.RLock()
_tree: Tree | None = None


def init(
    url: str | None = None,
    *,
    namespace: str | None = None,
    secret_key: str | bytes | None = None,
    strict: bool | None = None,
) -> Settings:
    """Choose the server of this process: `url`, MILLSTREAM_URL, or the embedded one that runs in this directory.

    Checks that it answers and that the secret is the right one. Raises BrokerUnavailableError, SignatureError, or
    ConfigError (also when `strict` and no secret is set). Calling it again with the same values changes nothing.
    """
    settings = find_settings(url, namespace=namespace, secret_key=secret_key, strict=strict)
    _use(settings)
    return settings


def is_initialized() -> bool:
    """Has this process chosen its server?"""
    return engines.is_initialized()


def shutdown() -> None:
    """Close this process's connections and end the processes it has started. What others run stays."""
    global _tree
    with _lock:
        tree, _tree = _tree, None
        engines.close_all()
    if tree is not None:
        tree.close()


def _use(settings: Settings) -> None:
    _warn_about_public_key(settings)
    engines.use(settings)
    with_registry(_nothing)


async def _nothing(_: Registry) -> None:
    """`with_registry` itself checks that the server answers and that the secret is right."""


def _warn_about_public_key(settings: Settings) -> None:
    if settings.is_public and not os.environ.get("MILLSTREAM_QUIET"):
        import sys

        print(
            "millstream: no secret is set, so whoever can write to this server can run code in your replicas; "
            "set MILLSTREAM_SECRET_KEY (any text) everywhere, or MILLSTREAM_STRICT=1 to refuse",
            file=sys.stderr,
        )


def with_registry(work: Callable[[Registry], Awaitable[T]]) -> T:
    """Run `work` on a registry of the process's server, from synchronous code; a connection of its own each time."""
    settings = engines.settings()

    async def go() -> T:
        client = open_control(settings, "ms:control")
        try:
            return await work(await connect_registry(client, settings))
        finally:
            await client.aclose()

    return engines.background().run(go())


def ensure_running(state: Path | None = None, *, dashboard: int | None = None) -> Tree | None:
    """Start what is missing: a server (durable in `state`, else temporary), a launcher, an autoscaler, a dashboard.

    What is started belongs to this process and ends with it. Returns the tree if there is one.
    """
    with _lock:
        if not engines.is_initialized():
            _use(_found() or _own_tree().start_server(state))
        missing = with_registry(_missing)
        for name in missing:
            _own_tree().start(name, [name], engines.settings())
        if dashboard is not None:
            _own_tree().start("dashboard", ["dashboard", "--port", str(dashboard)], engines.settings())
        return _tree


def _found() -> Settings | None:
    try:
        return find_settings()
    except BrokerUnavailableError:
        return None


async def _missing(registry: Registry) -> list[str]:
    missing = []
    if not await registry.nodes():
        missing.append("launcher")
    if not await registry.client.exists(registry.keys.leader):
        missing.append("autoscaler")
    return missing


def _own_tree() -> Tree:
    global _tree
    if _tree is None:
        _tree = Tree()
    return _tree
