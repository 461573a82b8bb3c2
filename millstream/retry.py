"""When a request whose code raised is tried again: a rule that travels as JSON, so exceptions are named, not pickled."""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from millstream.errors import ConfigError

EXCEPTION = "builtins.Exception"
Kind = str | type[BaseException]


@dataclass(frozen=True, slots=True)
class Retry:
    """Try a request again when its code raises: after a pause, `max_retries` times at most. Its last error is its result.

    These attempts are counted apart from those that end with the death of a replica (`max_attempts`). The pause before
    retry n is `backoff_s * factor ** (n - 1)`, `max_backoff_s` at most, less a random share of up to `jitter` of it,
    so that what failed together does not come back together. Meanwhile the request is delayed and takes no slot.

    `on` and `but_not` are exception classes, or their names ("ValueError", "mypackage.errors.Busy"); subclasses count,
    and `but_not` wins. Without `on` it is every `Exception`. Raises ConfigError.
    """

    max_retries: int = 3
    on: Kind | Iterable[Kind] = (EXCEPTION,)
    but_not: Kind | Iterable[Kind] = ()
    backoff_s: float = 1.0
    factor: float = 2.0
    max_backoff_s: float = 60.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        retries = self.max_retries
        if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= 1_000_000:
            raise ConfigError(f"retry: max_retries={retries!r} must be a whole number from 0 to 1,000,000")
        for name, least, most in (
            ("backoff_s", 0.0, math.inf), ("factor", 1.0, 1000.0), ("max_backoff_s", 0.0, math.inf), ("jitter", 0.0, 1.0),
        ):  # fmt: skip
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not least <= value <= most:
                limits = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
                raise ConfigError(f"retry: {name}={value!r} must be a number, {limits}")
        object.__setattr__(self, "on", _names("on", self.on))
        object.__setattr__(self, "but_not", _names("but_not", self.but_not))

    def applies_to(self, error: BaseException, retries: int) -> bool:
        """Is a request tried again that raised `error`, and was tried again `retries` times before?"""
        if retries >= self.max_retries:
            return False
        names = {_name_of(cls) for cls in type(error).__mro__}
        return not names.isdisjoint(self.on) and names.isdisjoint(self.but_not)  # type: ignore[arg-type]

    def delay_s(self, retries: int, chance: random.Random) -> float:
        """The pause before the next retry, after `retries` of them."""
        growth = self.factor ** min(retries, 1000) if self.factor > 1 else 1.0
        return min(self.max_backoff_s, self.backoff_s * growth) * (1 - self.jitter * chance.random())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        return cls(**json.loads(text))

    @classmethod
    def of(cls, value: Any) -> "Retry | None":
        """From what a user may write: a Retry, a number of retries, a dict of the fields, or None. ConfigError."""
        if value is None or isinstance(value, Retry):
            return value
        if isinstance(value, dict):
            known = [field.name for field in fields(cls)]
            if unknown := [name for name in value if name not in known]:
                raise ConfigError(f"retry has no {unknown[0]!r}; known are {', '.join(known)}")
            return cls(**value)
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(max_retries=value)
        raise ConfigError(f"retry={value!r} must be a serve.Retry, a number of retries, or a dict of its fields")


def _names(name: str, kinds: Any) -> tuple[str, ...]:
    if isinstance(kinds, str | type):
        kinds = (kinds,)
    if not isinstance(kinds, Iterable):
        raise ConfigError(f"retry: {name}={kinds!r} must be exception classes, or their names")
    return tuple(_checked(name, kind) for kind in kinds)


def _checked(name: str, kind: Any) -> str:
    if isinstance(kind, str) and kind:
        return kind if "." in kind else f"builtins.{kind}"
    if isinstance(kind, type) and issubclass(kind, BaseException):
        return _name_of(kind)
    raise ConfigError(f"retry: {name} has {kind!r}, which is no exception class and no name of one")


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
