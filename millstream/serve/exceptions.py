"""Where Ray Serve keeps its errors. All of them are of `millstream.errors`, under the names that ported code catches."""

from millstream.errors import (
    BackPressureError,
    DeployFailedError,
    MillstreamError,
    ReplicaDiedError,
    RequestCancelledError,
)

RayServeException = MillstreamError
DeploymentUnavailableError = DeployFailedError
ReplicaUnavailableError = ReplicaDiedError

__all__ = [
    "BackPressureError",
    "DeploymentUnavailableError",
    "RayServeException",
    "ReplicaUnavailableError",
    "RequestCancelledError",
]
