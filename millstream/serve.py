"""Ray Serve's API: deployments, applications, and what runs them.

`from millstream import serve` takes the place of `from ray import serve`.
"""

import asyncio
import time
from typing import Any, Literal, overload

from millstream.broker.codec import codec_for
from millstream.broker.definitions import Definition, seal
from millstream.broker.keys import check_name, deployment_tag
from millstream.broker.outcomes import no_such_deployment
from millstream.broker.registry import NewDeployment, Registry
from millstream.config import Settings
from millstream.deployment import Application, Deployment, Node, compile_graph, deployment
from millstream.errors import ConfigError, DeployFailedError
from millstream.handles import engines
from millstream.handles.generics import T
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.replicas.batching import batch
from millstream.replicas.context import ReplicaContext, get_replica_context
from millstream.replicas.multiplexing import get_multiplexed_model_id, multiplexed
from millstream.runtime import ensure_running, trouble, with_registry
from millstream.runtime import shutdown as _shutdown
from millstream.status import ApplicationStatus, DeploymentStatus, ReplicaStatus, ServeStatus, is_up, summarise

__all__ = [
    "Application",
    "ApplicationStatus",
    "Deployment",
    "DeploymentHandle",
    "DeploymentStatus",
    "ReplicaContext",
    "ReplicaStatus",
    "ServeStatus",
    "SyncHandle",
    "batch",
    "delete",
    "deployment",
    "get_app_handle",
    "get_deployment_handle",
    "get_multiplexed_model_id",
    "get_replica_context",
    "multiplexed",
    "run",
    "shutdown",
    "start",
    "status",
]

POLL_S = 0.01  # while a deployment comes up


def start() -> None:
    """Start what is missing to serve: an embedded server, a launcher, an autoscaler. `run` does it by itself."""
    ensure_running()


def run(
    target: Application[T], *, name: str = "default", blocking: bool = False, timeout_s: float | None = None
) -> SyncHandle[T]:
    """Deploy an application and wait until it serves; the handle of its ingress.

    Starts what is missing (embedded server, launcher, autoscaler); that ends with this process. An application of the
    same name is replaced: its queued requests stay, its replicas are exchanged. `blocking` waits for Ctrl-C after that.

    Raises TypeError for anything but what `.bind()` returns, SerializationError, DeployFailedError (with the
    constructor's traceback), BrokerUnavailableError, TimeoutError after `timeout_s`.
    """
    nodes = compile_graph(target, _checked(name))
    ensure_running()
    _deploy_nodes(nodes, name, timeout_s)
    if blocking:
        _wait_for_interrupt()
    return SyncHandle(nodes[0].name, name)


def deploy_only(target: Application, *, name: str = "default", timeout_s: float | None = None) -> None:
    """As `run`, onto the server and the launchers that run already: starts no process."""
    _deploy_nodes(compile_graph(target, _checked(name)), name, timeout_s)


def _deploy_nodes(nodes: list[Node], app: str, timeout_s: float | None) -> None:
    settings = engines.settings()
    new = [_new_deployment(settings, app, node) for node in nodes]
    with_registry(lambda registry: deploy(registry, app, new, timeout_s))


def _checked(name: str) -> str:
    try:
        return check_name("application", name)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _new_deployment(settings: Settings, app: str, node: Node) -> NewDeployment:
    codec = codec_for(settings.secret_key, settings.namespace, deployment_tag(app, node.name))
    definition = Definition(node.deployment.func_or_class, node.args, node.kwargs)
    return NewDeployment(node.name, node.config, seal(codec, definition))


async def deploy(registry: Registry, app: str, new: list[NewDeployment], timeout_s: float | None = None) -> None:
    """Store an application and wait until it serves. Raises DeployFailedError, TimeoutError."""
    record = await registry.deploy(app, new[0].name, new)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        views = [await registry.view(app, one.name) for one in new]
        present = [view for view in views if view is not None]
        for view in present:
            if view.failure:
                raise DeployFailedError(
                    f"deployment {view.tag} cannot start: {view.failure}; mend it and deploy again\n{view.traceback}".rstrip(),
                    deployment=view.tag,
                    remote_traceback=view.traceback,
                )
        if len(present) < len(new) or any(view.version != record.version for view in present):
            raise DeployFailedError(
                f"application {app!r} was deleted or replaced while it was coming up; deploy it again", deployment=app
            )
        if all(is_up(view) for view in present):
            return
        if trouble():
            raise DeployFailedError(f"application {app!r} cannot come up: {trouble()}", deployment=app)
        if deadline is not None and time.monotonic() > deadline:
            late = ", ".join(view.name for view in present if not is_up(view))
            raise TimeoutError(f"application {app!r} did not come up within {timeout_s} s: waiting for {late}")
        await asyncio.sleep(POLL_S)


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
