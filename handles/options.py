"""What `handle.options()` can set, checked; and how it travels with a request."""

import json
import math
import time
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, cast

from millstream.errors import ConfigError
from millstream.retry import Retry

# Options of later Ray Serve versions that choose between its own mechanisms: accepted, so that code ports unchanged.
IGNORED = frozenset({"use_new_handle_api", "_prefer_local_routing", "_by_reference"})
MOST_AHEAD = 1_000_000


@dataclass(frozen=True)
class HandleOptions:
    """What `options()` can set. Times are in seconds."""

    method_name: str = "__call__"
    block_until: Literal["matched", "queued"] = "matched"  # what `remote` waits for
    stream: bool = False  # `remote` returns a stream of the items of a generator method
    max_ahead: int = 64  # items of a stream that may be produced before they are read
    timeout_s: float | None = None  # from submission to result; then RequestTimeoutError
    priority: Literal["high", "normal", "low"] = "normal"
    delay_s: float = 0.0  # to be started no sooner than after so long
    eta: float | datetime | None = None  # to be started no sooner than then: a time zone aware datetime, or Unix time
    idempotency_key: str | None = None  # a second request with this key is the first one
    max_attempts: int | None = None  # instead of the deployment's
    retry: Retry | int | None = None  # instead of the deployment's: if its code raises; 0: never
    when_full: Literal["raise", "wait"] = "raise"  # where max_queued_requests wait already
    kill_on_cancel: bool = False  # replace the replica if it is still busy with a request that was cancelled
    multiplexed_model_id: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.method_name, str) or not 0 < len(self.method_name.encode()) < 256:
            raise ConfigError(f"method_name={self.method_name!r} must be a method's name, of at most 255 bytes")
        _one_of("block_until", self.block_until, "matched", "queued")
        _one_of("priority", self.priority, "high", "normal", "low")
        _one_of("when_full", self.when_full, "raise", "wait")
        _seconds("delay_s", self.delay_s, 0)
        if self.timeout_s is not None:
            _seconds("timeout_s", self.timeout_s, 0.001)
        for name in ("stream", "kill_on_cancel"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        _whole("max_ahead", self.max_ahead, 1, MOST_AHEAD)
        if self.max_attempts is not None:
            _whole("max_attempts", self.max_attempts, 1, 1000)
        object.__setattr__(self, "retry", Retry.of(self.retry))
        if self.idempotency_key is not None and (not isinstance(self.idempotency_key, str) or not self.idempotency_key):
            raise ConfigError(f"idempotency_key={self.idempotency_key!r} must be a text, not an empty one")
        if not isinstance(self.multiplexed_model_id, str):
            raise ConfigError(f"multiplexed_model_id={self.multiplexed_model_id!r} must be a text")
        _check_eta(self.eta)
        if self.eta is not None and self.delay_s:
            raise ConfigError(f"delay_s={self.delay_s} and eta={self.eta} exclude each other; drop one")
        if self.timeout_s is not None and self.timeout_s <= self.delay_s:
            raise ConfigError(
                f"timeout_s={self.timeout_s} counts from submission and would pass within delay_s={self.delay_s}; "
                "raise it, or lower the delay"
            )

    @cached_property
    def plain(self) -> bytes:
        """What a request says about itself beyond the usual, as `submit.lua` reads it; empty for most."""
        extras: dict[str, Any] = {}
        if self.timeout_s is not None:
            extras["timeout_ms"] = math.ceil(self.timeout_s * 1000)
        if self.max_attempts is not None:
            extras["attempts"] = self.max_attempts
        if self.retry is not None:
            extras["retry"] = cast(Retry, self.retry).to_json()
        if self.kill_on_cancel:
            extras["kill"] = 1
        if self.when_full == "wait":
            extras["patient"] = 1
        return json.dumps(extras).encode() if extras else b""

    @cached_property
    def matched(self) -> bytes:
        """As `plain`, and the caller wants to hear when a replica takes the request."""
        return b"matched" if not self.plain else with_extra(self.plain, want="matched")

    @cached_property
    def streaming(self) -> bytes:
        """As `plain`, and the items are wanted. Raises ConfigError."""
        if self.idempotency_key is not None:
            raise ConfigError(
                f"idempotency_key={self.idempotency_key!r} is not for streams: what one has read is gone for another; drop it"
            )
        return with_extra(self.plain, stream=self.max_ahead)

    @property
    def due_ms(self) -> int:
        """The `eta` in ms of Unix time; 0 without one, or if it has passed already."""
        if self.eta is None:
            return 0
        seconds = self.eta.timestamp() if isinstance(self.eta, datetime) else self.eta
        return int(seconds * 1000) if seconds > time.time() else 0


NAMES = tuple(field.name for field in fields(HandleOptions))


def with_extra(extras: bytes, **more: Any) -> bytes:
    """Extras of a request with more of them."""
    known = {"want": "matched"} if extras == b"matched" else json.loads(extras or b"{}")
    return json.dumps({**known, **more}).encode()


def with_time_left(extras: bytes, waited_s: float) -> bytes:
    """Extras of a request that was made so long ago: its time counts from then. Of the result, too."""
    known = json.loads(extras)
    asked_ms = known.get("asked_ms", known["timeout_ms"])
    left_ms = max(1, asked_ms - math.floor(waited_s * 1000))
    return json.dumps({**known, "asked_ms": asked_ms, "timeout_ms": left_ms}).encode()


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """Known options only; TypeError for others, as Ray has it."""
    for name in options:
        if name not in NAMES and name not in IGNORED:
            raise TypeError(f"options() got an unknown option {name!r}; known are {', '.join(NAMES)}")
    return {name: value for name, value in options.items() if name not in IGNORED}


def _one_of(name: str, value: Any, *known: str) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, known))}")


def _seconds(name: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ConfigError(f"{name}={value!r} must be a number of seconds, {least:g} or more")


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name}={value!r} must be a whole number from {least} to {most:,}")


def _check_eta(eta: Any) -> None:
    if isinstance(eta, datetime):
        if eta.tzinfo is None:
            raise ConfigError(
                f"eta={eta.isoformat()} has no time zone; write datetime.now(timezone.utc) + ..., or use delay_s"
            )
    elif eta is not None and (isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta < 1e11):
        raise ConfigError(f"eta={eta!r} must be a datetime with a time zone, or seconds of Unix time")
