"""The composition root: which server this process uses, and what it starts where something is missing."""

import importlib
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from millstream import embedded
from millstream.broker.connection import explained, open_control
from millstream.broker.registry import Registry, connect_registry
from millstream.config import Settings, find_settings, redact, state_folder
from millstream.errors import ConfigError
from millstream.handles import engines
from millstream.liveness import may_live
from millstream.tree import Tree

if TYPE_CHECKING:
    from millstream.replicas.local import LocalNode

T = TypeVar("T")

# What scripts pass to `ray.init` and what means nothing without a Ray cluster: accepted, so that code ports unchanged.
IGNORED_BY_INIT = frozenset(
    {
        "configure_logging", "dashboard_host", "dashboard_port", "ignore_reinit_error", "include_dashboard", "job_config",
        "local_mode", "log_to_driver", "logging_config", "logging_format", "logging_level", "num_cpus", "num_gpus",
        "object_store_memory", "resources", "runtime_env", "storage",
    }
)  # fmt: skip
NO_ADDRESS = ("auto", "local")  # Ray's words for "the cluster that there is" and "one of my own"

_lock = threading.RLock()
_tree: Tree | None = None
_node: "LocalNode | None" = None  # of local mode
_ends_ahead_of_exit = False
EXIT_PATIENCE_S = 0.2  # for what replicas on threads of ours still run at the end: nobody will have the results


def init(
    url: str | None = None,
    *,
    namespace: str | None = None,
    secret_key: str | bytes | None = None,
    strict: bool | None = None,
    address: str | None = None,
    **of_ray: Any,
) -> Settings:
    """Choose the server of this process: `url`, MILLSTREAM_URL, or the embedded one that runs in this directory.

    Without arguments it keeps what is in use (after `serve.run`, say). `address` is Ray's name for `url`; "auto" and
    "local" are as nothing. Other arguments of `ray.init` are accepted and have no effect.

    Checks that it answers and that the secret is the right one. Raises BrokerUnavailableError, SignatureError, or
    ConfigError (also when `strict` and no secret is set), TypeError for an unknown argument. Calling it again with the same values changes nothing.
    """
    for name in of_ray.keys() - IGNORED_BY_INIT:
        raise TypeError(f"init() got an unknown argument {name!r}; known are url, namespace, secret_key and strict")
    if url is not None and address is not None:
        raise ConfigError(f"url and address={redact(address)!r} are two names for one thing; drop one")
    url = address if url is None else url
    url = None if url in NO_ADDRESS else url
    if engines.is_initialized() and all(given is None for given in (url, namespace, secret_key, strict)):
        return engines.settings()
    settings = find_settings(url, namespace=namespace, secret_key=secret_key, strict=strict)
    _use(settings)
    return settings


def is_initialized() -> bool:
    """Has this process chosen its server?"""
    return engines.is_initialized()


def trouble() -> str:
    """What of ours does not run as it should, in words; empty if all is well."""
    node = local_node()
    return (_tree.trouble if _tree is not None else "") or (node.trouble if node is not None else "")


def owns_processes() -> bool:
    """Has this process started any of what it needs?"""
    return _tree is not None


def shutdown() -> None:
    """Close this process's connections and end what it has started: processes, and threads. What others run stays."""
    _shutdown(None)


def _shutdown(patience_s: float | None) -> None:
    global _tree, _node
    with _lock:
        node, tree = local_node(), _tree
        _node = _tree = None
    if node is not None:
        node.close(patience_s)  # first: what its replicas finish goes out over our engines
    engines.close_all()
    if tree is not None:
        tree.close()


def _use(settings: Settings) -> None:
    global _node
    node = local_node()
    if node is not None and node.settings != settings:
        _node = None
        node.close()
    engines.use(settings)
    try:
        with_registry(_nothing)
    except BaseException:
        engines.close_all()  # a server that cannot be used is not in use
        raise
    warn_about_public_key(settings)


async def _nothing(_: Registry) -> None:
    """`with_registry` itself checks that the server answers and that the secret is right."""


def warn_about_public_key(settings: Settings) -> None:
    """Say, once at the start of a process that serves, what it means that no secret is set."""
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
            with explained():
                return await work(await connect_registry(client, settings))
        finally:
            await client.aclose()

    return engines.background().run(go())


def ensure_running(
    state: Path | None = None, *, namespace: str | None = None, dashboard: int | None = None
) -> Tree | None:
    """Start what is missing: a server (durable in `state`, else temporary), a launcher, an autoscaler, a dashboard.

    What is started belongs to this process and ends with it; `dashboard` is its port. Returns the tree if there is one.
    Twice is as once.
    """
    with _lock:
        if local_node() is not None:
            raise ConfigError(
                "this process serves in local mode, and a launcher would run the same applications a second time; "
                "call millstream.shutdown() first, or serve in local mode only (local=True)"
            )
        if not engines.is_initialized():
            _use(_found(state, namespace) or _start_server(state, namespace))
        for name in _missing():
            _own_tree().start(name, [name], engines.settings())
        if dashboard is not None:
            _own_tree().start("dashboard", ["dashboard", "--port", str(dashboard)], engines.settings())
        return _tree


def ensure_local() -> "LocalNode":
    """What runs replicas in this process: started if need be, on the server in use, else on a private temporary one.

    MILLSTREAM_URL and the server of this directory do not count: tests should not meet anybody there. ConfigError where
    launchers serve, who would run the same applications.
    """
    global _node
    with _lock:
        node = local_node()
        if node is None or node.trouble:
            if not engines.is_initialized():
                engines.use(_start_server(None, None, meanwhile=load_local_mode))  # ours and new: nothing to check
            elif others := with_registry(_launchers):
                raise ConfigError(
                    f"local=True runs replicas in this process, and {others} would run them, too; choose another "
                    "namespace with millstream.init(namespace=...), or call millstream.shutdown() first"
                )
            from millstream.replicas.local import LocalNode

            node = _node = LocalNode(engines.settings())
            _end_ahead_of_exit()
        return node


def local_node() -> "LocalNode | None":
    """What runs replicas in this process, if anything does. After a fork that is left to the parent."""
    return _node if _node is not None and _node.pid == os.getpid() else None


def _end_ahead_of_exit() -> None:
    """Python waits for the threads of executors, where user code may never return, before it calls what atexit knows."""
    global _ends_ahead_of_exit
    if not _ends_ahead_of_exit:
        _ends_ahead_of_exit = True
        threading._register_atexit(_end_local)  # type: ignore[attr-defined]


def _end_local() -> None:
    from millstream.replicas.thread import let_go_of_threads

    if local_node() is not None:
        _shutdown(EXIT_PATIENCE_S)
    let_go_of_threads()


async def _launchers(registry: Registry) -> str:
    nodes = sorted(await registry.nodes())
    if not nodes and _tree is not None and _tree.has("launcher"):
        return "the launcher of this process"
    return f"node {', '.join(nodes)} on this server" if nodes else ""


def _found(state: Path | None, namespace: str | None) -> Settings | None:
    """The server that the environment names, else the one that runs in the state folder. An advert alone does not count."""
    if os.environ.get("MILLSTREAM_URL") or embedded.is_running(state_folder(state)):
        return find_settings(namespace=namespace, state=state)
    return None


def _start_server(
    state: Path | None, namespace: str | None, meanwhile: Callable[[], object] = lambda: None
) -> Settings:
    return _own_tree().start_server(state, namespace or os.environ.get("MILLSTREAM_NAMESPACE") or "ms", meanwhile)


def load_local_mode() -> None:
    """What takes 50 ms to import, and is needed once the server is up."""
    importlib.import_module("millstream.replicas.local")
    engines.new_loop().close()


def _missing() -> list[str]:
    """What does not live. With a server just started that is everything: leases in its data are of the dead."""
    missing = ["launcher", "autoscaler"]
    if _tree is None or not _tree.has_server:
        missing = with_registry(_without_lease)
    return [name for name in missing if _tree is None or not _tree.has(name)]


async def _without_lease(registry: Registry) -> list[str]:
    """Leases outlive their holders for seconds: of one on this host its process tells."""
    missing = []
    if not any(may_live(node.host, node.pid) for node in (await registry.nodes()).values()):
        missing.append("launcher")
    leader = (await registry.client.get(registry.keys.leader) or b"").decode(errors="replace").partition(" ")[0]
    host, _, rest = leader.rpartition("-")[0].rpartition("-")
    if not leader or (rest.isdecimal() and not may_live(host, int(rest))):
        missing.append("autoscaler")
    return missing


def _own_tree() -> Tree:
    global _tree
    if _tree is None:
        _tree = Tree()
    return _tree
