"""Where Ray keeps its errors: `ray.exceptions`. All of them are of `millstream.errors`, under the names Ray gives them.

Some of Ray's are one error here, so that an `except` may catch a little more than it did: `RayActorError` and
`WorkerCrashedError` both mean that the replica died in every attempt.
"""

from millstream.errors import (
    BackPressureError,
    BrokerUnavailableError,
    GetTimeoutError,
    MillstreamError,
    RefNotFoundError,
    ReplicaDiedError,
    RequestCancelledError,
    TaskError,
)

RayError = MillstreamError
RayTaskError = TaskError  # what is caught is an instance of the user's class, too
RayActorError = ActorDiedError = ActorUnavailableError = WorkerCrashedError = ReplicaDiedError
TaskCancelledError = RequestCancelledError
ObjectLostError = OwnerDiedError = ObjectFetchTimedOutError = RefNotFoundError
ObjectStoreFullError = BackPressureError  # the server has no memory left
RaySystemError = BrokerUnavailableError

__all__ = [
    "ActorDiedError",
    "ActorUnavailableError",
    "GetTimeoutError",
    "ObjectFetchTimedOutError",
    "ObjectLostError",
    "ObjectStoreFullError",
    "OwnerDiedError",
    "RayActorError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
    "TaskCancelledError",
    "WorkerCrashedError",
]
