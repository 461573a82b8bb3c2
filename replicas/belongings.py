"""What `serve.batch` and `serve.multiplexed` keep with the object they work for: in its own `__dict__`.

So it lives exactly as long as the object does, whatever the object's own idea of equality and hashing.
"""

from collections.abc import Mapping
from typing import Any

_NAME = "__millstream__"


def keep_with(owner: Any) -> dict[str, Any]:
    """A dict that belongs to this object alone. TypeError for one that has no `__dict__`."""
    namespace = getattr(owner, "__dict__", None)
    if not isinstance(namespace, dict):
        raise TypeError(
            f"{type(owner).__name__} has no __dict__ to keep models or batch settings in: its class defines __slots__; "
            "add '__dict__' to them"
        )
    kept: dict[str, Any] = namespace.setdefault(_NAME, {})
    return kept


def kept_with(owner: Any) -> Mapping[str, Any]:
    """What has been kept, to look at. Any object will do."""
    kept: Mapping[str, Any] = getattr(owner, "__dict__", {}).get(_NAME, {})
    return kept
