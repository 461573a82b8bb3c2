"""Ray Serve's handle API on nothing but Redis.

    from millstream import serve

    @serve.deployment
    class Hello:
        async def __call__(self, name: str) -> str:
            return f"hello {name}"

    handle = serve.run(Hello.bind())
    assert handle.call("Ada") == "hello Ada"

Names are loaded when they are first used: importing the package costs a millisecond.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from millstream import exceptions as exceptions
    from millstream import serve as serve
    from millstream.errors import BackPressureError as BackPressureError
    from millstream.errors import BrokerUnavailableError as BrokerUnavailableError
    from millstream.errors import ConfigError as ConfigError
    from millstream.errors import DeployFailedError as DeployFailedError
    from millstream.errors import DeploymentNotFoundError as DeploymentNotFoundError
    from millstream.errors import GetTimeoutError as GetTimeoutError
    from millstream.errors import MethodNotFoundError as MethodNotFoundError
    from millstream.errors import MillstreamError as MillstreamError
    from millstream.errors import PayloadTooLargeError as PayloadTooLargeError
    from millstream.errors import RefNotFoundError as RefNotFoundError
    from millstream.errors import ReplicaDiedError as ReplicaDiedError
    from millstream.errors import RequestCancelledError as RequestCancelledError
    from millstream.errors import RequestTimeoutError as RequestTimeoutError
    from millstream.errors import SerializationError as SerializationError
    from millstream.errors import SignatureError as SignatureError
    from millstream.errors import TaskError as TaskError
    from millstream.handles.handle import DeploymentHandle as DeploymentHandle
    from millstream.handles.handle import SyncHandle as SyncHandle
    from millstream.handles.ref import ObjectRef as ObjectRef
    from millstream.handles.waiting import cancel as cancel
    from millstream.handles.waiting import get as get
    from millstream.handles.waiting import put as put
    from millstream.handles.waiting import wait as wait
    from millstream.runtime import init as init
    from millstream.runtime import is_initialized as is_initialized
    from millstream.runtime import shutdown as shutdown

_ERRORS = (
    "BackPressureError", "BrokerUnavailableError", "ConfigError", "DeployFailedError", "DeploymentNotFoundError",
    "GetTimeoutError", "MethodNotFoundError", "MillstreamError", "PayloadTooLargeError", "RefNotFoundError",
    "ReplicaDiedError",
    "RequestCancelledError", "RequestTimeoutError", "SerializationError", "SignatureError", "TaskError",
)  # fmt: skip
_HOMES = {
    **dict.fromkeys(_ERRORS, "millstream.errors"),
    **dict.fromkeys(("cancel", "get", "put", "wait"), "millstream.handles.waiting"),
    **dict.fromkeys(("init", "is_initialized", "shutdown"), "millstream.runtime"),
    **dict.fromkeys(("DeploymentHandle", "SyncHandle"), "millstream.handles.handle"),
    "ObjectRef": "millstream.handles.ref",
}

__all__ = ["__version__", "serve", *sorted([*_HOMES, "exceptions"])]  # noqa: PLE0604 - strings all


def __getattr__(name: str) -> Any:
    if name in ("exceptions", "serve"):
        return importlib.import_module(f"millstream.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'millstream' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
