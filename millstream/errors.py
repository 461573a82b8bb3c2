"""Every error millstream raises. Each message says what happened, to which request or deployment, and what to do next.

    MillstreamError
    ├── TaskError                  a request's own code raised; also an instance of the user's exception class
    ├── GetTimeoutError            the caller stopped waiting; the request goes on          (also a TimeoutError)
    ├── RequestTimeoutError        the request's own deadline passed                        (also a TimeoutError)
    ├── RequestCancelledError      somebody cancelled the request
    ├── BackPressureError          the deployment's queue (or the server) is full
    ├── ReplicaDiedError           every attempt ended with the death of its replica
    ├── RefNotFoundError           the ref is unknown or its result has expired
    ├── DeploymentNotFoundError    nothing is deployed under that name
    ├── MethodNotFoundError        the deployment has no method of that name
    ├── DeployFailedError          the deployment cannot start; carries the constructor's traceback
    ├── SerializationError         a value cannot be pickled; names the attribute path
    ├── SignatureError             bytes were not signed with this installation's secret
    ├── PayloadTooLargeError       a value is larger than the payload limit
    ├── BrokerUnavailableError     the Redis server does not answer
    └── ConfigError                a setting is out of range or contradicts another         (also a ValueError)

All of them pickle, and carry the ids they speak of as attributes.
"""

from typing import Any


class MillstreamError(Exception):
    """Base of all errors millstream raises by itself.

    `fields` become attributes; they survive pickling together with the message.
    """

    def __init__(self, message: str, /, **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), dict(self.__dict__))


def _rebuild(cls: type[MillstreamError], message: str, fields: dict[str, Any]) -> MillstreamError:
    return cls(message, **fields)


class TaskError(MillstreamError):
    """The deployment's code raised. `str()` is the remote traceback, `cause` the original exception where it could travel.

    What a caller catches is an instance of this class *and* of the user's exception class.
    """

    cause: BaseException | None = None
    cause_type: str = ""
    remote_traceback: str = ""
    ref_id: str = ""


class GetTimeoutError(MillstreamError, TimeoutError):
    """`get`, `wait` or `result` ran out of time. The request goes on; ask again with the same ref."""

    ref_id: str = ""


class RequestTimeoutError(MillstreamError, TimeoutError):
    """The request's own deadline passed before it had a result. It is not started any more, or was cancelled."""

    ref_id: str = ""


class RequestCancelledError(MillstreamError):
    """The request was cancelled: by `cancel`, by a caller that was cancelled itself, or because its deployment was deleted."""

    ref_id: str = ""


class BackPressureError(MillstreamError):
    """The deployment's queue is full, the server has no memory left, or this process has too much that is not sent yet."""

    deployment: str = ""


class ReplicaDiedError(MillstreamError):
    """The request was being run each time its replica died, until its attempts were used up. `attempts` lists them."""

    ref_id: str = ""
    attempts: list[dict[str, Any]]


class RefNotFoundError(MillstreamError):
    """No such ref: its result expired, was dropped, or it never existed here."""

    ref_id: str = ""


class DeploymentNotFoundError(MillstreamError):
    """Nothing is deployed under that name."""

    app: str = ""
    deployment: str = ""


class MethodNotFoundError(MillstreamError):
    """The deployment has no such method, in none of the versions that serve or are to come. The message names those it has."""

    method: str = ""


class DeployFailedError(MillstreamError):
    """The deployment cannot start. `deployment` names it, `remote_traceback` holds its constructor's traceback."""

    deployment: str = ""
    remote_traceback: str = ""


class SerializationError(MillstreamError):
    """A value cannot be pickled. `path` names the attribute or item that is in the way."""

    path: str = ""


class SignatureError(MillstreamError):
    """Bytes read from Redis do not bear this installation's signature, and were not unpickled."""

    ref_id: str = ""


class PayloadTooLargeError(MillstreamError):
    """A value is larger than the payload limit."""


class BrokerUnavailableError(MillstreamError):
    """The Redis server cannot be reached, or went away and did not come back in time."""


class ConfigError(MillstreamError, ValueError):
    """A setting is out of range, or two settings contradict each other."""
