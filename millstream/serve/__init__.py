"""Ray Serve's API: deployments, applications, and what runs them.

`from millstream import serve` takes the place of `from ray import serve`.
"""

import asyncio
import contextlib
import math
import os
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from millstream.broker.codec import codec_for
from millstream.broker.connection import DOWN
from millstream.broker.definitions import Definition, by_name, code_of, seal
from millstream.broker.keys import check_name, deployment_tag
from millstream.broker.outcomes import deploy_failed, no_such_deployment
from millstream.broker.records import AppRecord, DeploymentView, NewDeployment
from millstream.broker.registry import Registry
from millstream.config import Settings
from millstream.deployment import Application, Deployment, Node, compile_graph, deployment
from millstream.errors import BrokerUnavailableError, ConfigError, DeployFailedError
from millstream.handles import context, engines
from millstream.handles.context import Request
from millstream.handles.generics import T
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.replicas.batching import batch
from millstream.replicas.context import ReplicaContext, get_replica_context
from millstream.replicas.multiplexing import get_multiplexed_model_id, multiplexed
from millstream.retry import Retry
from millstream.runtime import ensure_local, ensure_running, owns_processes, trouble, with_registry
from millstream.runtime import shutdown as _shutdown
from millstream.serve import config, exceptions, handle  # noqa: F401 - `serve.exceptions` is there, as in Ray
from millstream.serve.v1 import Deployed, get_deployment, list_deployments
from millstream.status import ApplicationStatus, DeploymentStatus, ReplicaStatus, ServeStatus, summarise

__all__ = [
    "Application",
    "ApplicationStatus",
    "Deployed",
    "Deployment",
    "DeploymentHandle",
    "DeploymentStatus",
    "ReplicaContext",
    "ReplicaStatus",
    "Request",
    "Retry",
    "ServeStatus",
    "SyncHandle",
    "batch",
    "delete",
    "deployment",
    "get_app_handle",
    "get_deployment",
    "get_deployment_handle",
    "get_multiplexed_model_id",
    "get_replica_context",
    "get_request_context",
    "list_deployments",
    "multiplexed",
    "run",
    "shutdown",
    "start",
    "status",
]

POLL_S = 0.01  # while a deployment comes up
PATIENCE_S = 30.0  # with a server that does not answer meanwhile; as long as a request is kept that cannot be sent


def start(
    *,
    local: bool | None = None,
    detached: bool = False,
    http_options: Any = None,
    grpc_options: Any = None,
    proxy_location: Any = None,
    logging_config: Any = None,
    dedicated_cpu: bool = False,
) -> None:
    """Start what is missing to serve: an embedded server, a launcher, an autoscaler. `run` does it by itself.

    `local` is as there. The other arguments are Ray's and have no effect; with `detached=True` a warning says so where
    something was started, because that ends with this process all the same.
    """
    if _is_local(local):
        ensure_local()
    else:
        ensure_running()
    if detached and owns_processes():
        warnings.warn(
            "detached=True: what serve.start has started ends with this process all the same; to serve on without it, "
            "run `millstream run module:app`",
            stacklevel=2,
        )


def run(
    target: Application[T],
    *,
    name: str = "default",
    blocking: bool = False,
    timeout_s: float | None = None,
    local: bool | None = None,
    host: str | None = None,
    port: int | None = None,
    route_prefix: str | None = None,
    logging_config: Any = None,
    _blocking: bool = True,
    _local_testing_mode: bool = False,
) -> SyncHandle[T]:
    """Deploy an application and wait until it serves; the handle of its ingress.

    Starts what is missing (embedded server, launcher, autoscaler); that ends with this process. `blocking` waits for
    Ctrl-C after that.

    An application of the same name is replaced while it serves; no request is lost. Deployments with other code, other
    constructor arguments, or another sync_threads, start_method, resources or version get new replicas, which start
    before the old ones leave. The replicas of the others stay, with the state of their objects, and take the new options
    over; a new user_config goes to `reconfigure`, when what runs in that replica has ended, to a fifth of the replicas
    at a time. Where `reconfigure` raises, the deployment goes back to the options it had.

    `local=True` (or MILLSTREAM_LOCAL=1, or Ray's `_local_testing_mode=True`) is for tests: replicas run on threads of
    this process, on a private server (or the one that `millstream.init` has chosen), and nothing is scaled. Classes and
    functions are used as they are in memory; arguments are pickled, as everywhere.

    `_blocking=False`, Ray's, does not wait until the application serves: requests do, and `status()` tells when it does,
    or why it cannot (local mode waits all the same). `host`, `port`, `route_prefix` and `logging_config` are Ray's, for
    HTTP and logs: without effect.

    Raises TypeError for anything but what `.bind()` returns, SerializationError, DeployFailedError (with the traceback
    of the constructor or of `reconfigure`), BrokerUnavailableError, TimeoutError after `timeout_s`, and ConfigError where
    launchers run and `local` is asked for, or the other way round.
    """
    nodes = compile_graph(target, _checked(name))
    if _is_local(True if _local_testing_mode else local):
        _deploy_here(nodes, name, timeout_s, wait=_blocking)
    else:
        ensure_running()
        _deploy_nodes(nodes, name, timeout_s, wait=_blocking)
    if blocking:
        _wait_for_interrupt()
    return SyncHandle(nodes[0].name, name)


def _is_local(local: bool | None) -> bool:
    return os.environ.get("MILLSTREAM_LOCAL", "") not in ("", "0") if local is None else local


def deploy_only(target: Application, *, name: str = "default", timeout_s: float | None = None) -> None:
    """As `run`, onto the server and the launchers that run already: starts no process."""
    _deploy_nodes(compile_graph(target, _checked(name)), name, timeout_s)


def _deploy_nodes(nodes: list[Node], app: str, timeout_s: float | None, *, wait: bool = True) -> None:
    settings = engines.settings()
    new = [_new_deployment(settings, app, node, node.deployment.func_or_class) for node in nodes]
    with_registry(lambda registry: deploy(registry, app, new, timeout_s, wait=wait))


def _deploy_here(nodes: list[Node], app: str, timeout_s: float | None, *, wait: bool = True) -> None:
    """As `_deploy_nodes`, with the replicas on threads of this process."""
    node, settings = ensure_local(), engines.settings()
    from millstream.replicas.thread import Recipe  # loaded by now, while the server started

    new, recipes = [], {}
    for one in nodes:
        target, tag = one.deployment.func_or_class, deployment_tag(app, one.name)
        sealed = _new_deployment(settings, app, one, by_name(target))
        new.append(replace(sealed, code=""))  # what is in memory may have changed: replicas are replaced each time
        recipes[tag] = Recipe(target, sealed.definition, one.config)

    async def host(record: AppRecord) -> None:
        await node.host(record, recipes)

    with_registry(lambda registry: deploy(registry, app, new, timeout_s, host, wait=wait))


def _checked(name: str) -> str:
    try:
        return check_name("application", name)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _new_deployment(settings: Settings, app: str, node: Node, target: Any) -> NewDeployment:
    codec = codec_for(settings.secret_key, settings.namespace, deployment_tag(app, node.name))
    envelope = seal(codec, Definition(target, node.args, node.kwargs))
    return NewDeployment(node.name, node.config, envelope, code_of(codec, envelope, node.config))


async def deploy(
    registry: Registry,
    app: str,
    new: list[NewDeployment],
    timeout_s: float | None = None,
    host: Callable[[AppRecord], Awaitable[None]] | None = None,
    *,
    wait: bool = True,
) -> None:
    """Store an application and wait until it serves as stored; outages of the server are waited out, for PATIENCE_S.

    `host` starts its replicas; without it launchers do. With `wait=False` it is stored (and hosted) only. Raises DeployFailedError, TimeoutError, BrokerUnavailableError.
    """
    record = await registry.deploy(app, new[0].name, new)
    answered_at = time.monotonic()
    deadline = math.inf if timeout_s is None else answered_at + timeout_s
    late = record.deployments
    if host is not None:
        with contextlib.suppress(TimeoutError):  # said below, with what is late
            await asyncio.wait_for(host(record), timeout_s)
    while wait:
        try:
            late = await _not_up(registry, record)
            answered_at = time.monotonic()
        except DOWN as e:
            if time.monotonic() - answered_at > PATIENCE_S:
                raise BrokerUnavailableError(
                    f"application {app!r} is stored, and the server went away while it was coming up ({e}); "
                    "`millstream status` shows how it does when the server is back"
                ) from e
        if not late:
            return
        if trouble():
            raise DeployFailedError(f"application {app!r} cannot come up: {trouble()}", deployment=app)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"application {app!r} did not come up within {timeout_s} s: waiting for {', '.join(late)}"
            )
        await asyncio.sleep(POLL_S)


async def _not_up(registry: Registry, record: AppRecord) -> list[str]:
    """The deployments that do not serve yet as they were stored. Raises DeployFailedError if one will not."""
    views = [await registry.view(record.name, name) for name in record.deployments]
    present = [view for view in views if view is not None]
    _raise_what_failed(present, record.version)
    if len(present) < len(views) or any(view.revision != record.version for view in present):
        raise DeployFailedError(
            f"application {record.name!r} was deleted or replaced while it was coming up; deploy it again",
            deployment=record.name,
        )
    return [view.name for view in present if not view.is_up and not (await registry.without_the_dead(view)).is_up]


def _raise_what_failed(views: list[DeploymentView], revision: str) -> None:
    for view in views:
        if view.refused == revision:
            raise DeployFailedError(
                f"deployment {view.tag} goes on as it was before, because the new config was refused: {view.refusal}; "
                f"mend it and deploy again\n{view.refusal_traceback}".rstrip(),
                deployment=view.tag,
                remote_traceback=view.refusal_traceback,
            )
        if view.failure:
            raise deploy_failed(view.tag, view.failure, view.traceback)


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        shutdown()


def delete(name: str) -> None:
    """Remove an application: its replicas finish what they run and end, what is queued is gone. No error if there is none."""
    with_registry(lambda registry: registry.delete(_checked(name)))


def status() -> ServeStatus:
    """What is deployed and how it is, read from Redis now."""

    async def read(registry: Registry) -> ServeStatus:
        return summarise(await registry.apps(), await registry.views())

    return with_registry(read)


def shutdown() -> None:
    """Delete all applications and end the processes that this process has started. No error if nothing runs.

    All means all on this server and namespace, also those that others have deployed: on a server that is shared, use
    `delete(name)` and `millstream.shutdown()`.
    """
    if engines.is_initialized():

        async def delete_all(registry: Registry) -> None:
            for app in await registry.apps():
                await registry.delete(app)

        with_registry(delete_all)
    _shutdown()


def get_app_handle(name: str = "default") -> DeploymentHandle:
    """The handle of an application's ingress. DeploymentNotFoundError if it is not deployed."""

    async def ingress(registry: Registry) -> str:
        record = (await registry.apps()).get(name)
        if record is None:
            raise no_such_deployment(deployment_tag(name, "?"))
        return record.ingress

    return DeploymentHandle(with_registry(ingress), name)


@overload
def get_deployment_handle(
    deployment_name: str, app_name: str = "default", *, sync: Literal[False] = False
) -> DeploymentHandle: ...
@overload
def get_deployment_handle(deployment_name: str, app_name: str = "default", *, sync: Literal[True]) -> SyncHandle: ...
def get_deployment_handle(deployment_name: str, app_name: str = "default", *, sync: bool = False) -> Any:
    """A handle by name. Sends nothing: an unknown deployment is reported by the first request."""
    check_name("deployment", deployment_name)
    return (SyncHandle if sync else DeploymentHandle)(deployment_name, _checked(app_name))


def get_request_context() -> Request:
    """What code may know of the request that it runs for: its id, and whether it was cancelled. RuntimeError outside of one.

    A cancelled coroutine is told by asyncio.CancelledError; a sync method, whose thread nobody can end, asks
    `is_cancelled` now and then, or sleeps with `wait_cancelled(timeout_s)`.
    """
    request = context.current.get()
    if request is None:
        raise RuntimeError(
            "no request runs here: call get_request_context() in a method of a deployment, "
            "in its own task or thread (contextvars.copy_context() takes it along into others)"
        )
    return request


# What Ray's module has and this one has not, and what to do instead.
_INSTEAD = {
    "connect": "millstream.init(url) chooses the server",
    "ingress": "nothing here listens for HTTP: call handles from a web framework, as examples/fastapi_app does",
    "run_many": "call serve.run() once for each application",
    "shutdown_async": "await asyncio.to_thread(serve.shutdown)",
}

if not TYPE_CHECKING:  # a type checker should see that these are not there

    def __getattr__(name: str) -> Any:
        hint = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise AttributeError(f"module 'millstream.serve' has no attribute {name!r}{hint}")
