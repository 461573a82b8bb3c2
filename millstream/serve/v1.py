"""What is left of Ray Serve's first API: deployments without a graph, each an application of its own name.

`D.deploy(...)` is `serve.run(D.bind(...), name=D.name)`. New code binds and runs.
"""

from typing import NoReturn

from millstream.broker.registry import Registry
from millstream.errors import DeploymentNotFoundError
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.runtime import with_registry


class Deployed:
    """What `get_deployment` finds: a deployment that runs, by its name. Its code is with its replicas, not here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_handle(self, sync: bool = True) -> SyncHandle | DeploymentHandle:
        """A handle of it: one that blocks, or with sync=False one for an event loop."""
        return (SyncHandle if sync else DeploymentHandle)(self.name, self.name)

    def delete(self) -> None:
        """As `serve.delete(name)`."""
        with_registry(lambda registry: registry.delete(self.name))

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("bind", "deploy", "options"):
            raise AttributeError(
                f"{self!r} has no {name}(): its code is with its replicas; use the class or function that was deployed, "
                "as in D.options(num_replicas=2).deploy(...)"
            )
        raise AttributeError(f"Deployed has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        return self.name == other.name if isinstance(other, Deployed) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"Deployed(name={self.name!r})"


def get_deployment(name: str) -> Deployed:
    """A deployment that `D.deploy()` has deployed. DeploymentNotFoundError if there is none of that name.

    One of an application that `serve.run` has deployed is reached by `get_deployment_handle(name, app_name)`.
    """
    deployed = list_deployments()
    if name not in deployed:
        raise DeploymentNotFoundError(
            f"nothing was deployed by {name}.deploy(); for a deployment of an application of serve.run use "
            f"serve.get_deployment_handle({name!r}, app_name)",
            deployment=name,
        )
    return deployed[name]


def list_deployments() -> dict[str, Deployed]:
    """What `D.deploy()` has deployed, by name."""

    async def names(registry: Registry) -> list[str]:
        return [name for name, record in (await registry.apps()).items() if record.ingress == name]

    return {name: Deployed(name) for name in with_registry(names)}
