"""Settings as small frozen values, checked when they are built. Nothing here does I/O but `find_settings`."""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from millstream.errors import BrokerUnavailableError, ConfigError
from millstream.retry import Retry

# A damaged byte is detected with this key, a forged one is not: DESIGN section 5, invariant 10.
PUBLIC_KEY = b"millstream: this key is public, it detects damage only"
LEASE_S = 5.0
CLUSTER_SCHEMES = ("redis+cluster://", "rediss+cluster://")
STATE_FOLDER = ".millstream"
ADVERT = "server.json"  # in the state folder: where the embedded server listens, and its secret (mode 0600)

_PASSWORD_IN_QUERY = re.compile(r"([?&]\w*password\w*=)[^&]*", re.IGNORECASE)  # redis-py takes it from there, too


@dataclass(frozen=True, slots=True)
class Settings:
    """Which server, which namespace on it, and which secret signs what is stored there."""

    url: str
    namespace: str = "ms"
    secret_key: bytes = field(default=PUBLIC_KEY, repr=False)
    lease_s: float = LEASE_S  # who has not been heard of for so long is taken for dead

    def __post_init__(self) -> None:
        if not self.url.startswith(("redis://", "rediss://", "unix://", *CLUSTER_SCHEMES)):
            raise ConfigError(
                f"url {redact(self.url)!r} is not a Redis URL; "
                "write redis://host:port, rediss://, unix:// or redis+cluster://host:port,host:port"
            )
        if self.is_cluster and not re.fullmatch(
            r"[^/?]+(/0?)?(\?.*)?", self.url.partition("://")[2].rpartition("@")[2]
        ):
            raise ConfigError(
                f"url {redact(self.url)!r} must name hosts of the cluster and no database but 0: a cluster has no other"
            )
        if not self.namespace or not self.namespace.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"namespace {self.namespace!r} must consist of letters, digits, '-' and '_'")
        if not 1 <= len(self.secret_key) <= 64:
            raise ConfigError(
                f"secret_key has {len(self.secret_key)} bytes, must have 1 to 64; for a longer one use its SHA-256"
            )
        if isinstance(self.lease_s, bool) or not isinstance(self.lease_s, int | float) or not 1 <= self.lease_s <= 3600:
            raise ConfigError(f"lease_s={self.lease_s!r} must be a number of seconds, from 1 to 3600")

    def __repr__(self) -> str:
        return f"Settings(url={redact(self.url)!r}, namespace={self.namespace!r}, secret_key=<hidden>)"

    @property
    def is_cluster(self) -> bool:
        return self.url.startswith(CLUSTER_SCHEMES)

    @property
    def is_public(self) -> bool:
        """True when no secret was set: whoever can write to the server can make replicas run code."""
        return self.secret_key == PUBLIC_KEY

    def to_environment(self) -> dict[str, str]:
        """The variables that make a child process use the same settings. Not for logs: they hold the secret."""
        return {
            "MILLSTREAM_URL": self.url,
            "MILLSTREAM_NAMESPACE": self.namespace,
            "MILLSTREAM_SECRET_KEY": "" if self.is_public else self.secret_key.hex(),
            "MILLSTREAM_LEASE_S": f"{self.lease_s:g}",
        }


def redact(url: str) -> str:
    """The URL without its password, for messages and logs. Of what is no URL, too: that is said where it is refused."""
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    credentials, at, host = rest.rpartition("@")
    host = _PASSWORD_IN_QUERY.sub(r"\1***", host)
    return f"{scheme}{separator}{'***@' if at and credentials else ''}{host}"


def parse_secret(text: str | bytes | None) -> bytes:
    """Turn a secret as a person writes it (hex, or any text) into key bytes. None and "" mean the public key."""
    if not text:
        return PUBLIC_KEY
    if isinstance(text, bytes):
        return text
    try:
        return bytes.fromhex(text)
    except ValueError:
        return text.encode()


def find_settings(
    url: str | None = None,
    *,
    namespace: str | None = None,
    secret_key: str | bytes | None = None,
    strict: bool | None = None,
    state: str | os.PathLike[str] | None = None,
) -> Settings:
    """Arguments first, then MILLSTREAM_URL, _NAMESPACE and _SECRET_KEY, then the server advertised in the state folder.

    The lease is what MILLSTREAM_LEASE_S says.
    Raises BrokerUnavailableError when no server is named anywhere, ConfigError when `strict` and no secret is set.
    """
    url = url or os.environ.get("MILLSTREAM_URL")
    secret = secret_key or os.environ.get("MILLSTREAM_SECRET_KEY")
    if not url:
        advert = read_advert(state)
        if advert is None:
            raise BrokerUnavailableError(
                "no server to talk to: pass url=, set MILLSTREAM_URL, or start one here with `millstream run module:app`"
            )
        # Not the environment's secret: that belongs to the environment's URL, and the folder's data bears the folder's.
        url, secret = advert["url"], secret_key or advert["secret_key"]
    namespace = namespace or os.environ.get("MILLSTREAM_NAMESPACE") or "ms"
    found = Settings(url, namespace, parse_secret(secret), find_lease_s())
    if strict is None:
        strict = os.environ.get("MILLSTREAM_STRICT", "") not in ("", "0")
    if strict and found.is_public:
        raise ConfigError("strict=True but no secret is set: pass secret_key= or set MILLSTREAM_SECRET_KEY")
    return found


def find_lease_s() -> float:
    """MILLSTREAM_LEASE_S, or the default. ConfigError."""
    text = os.environ.get("MILLSTREAM_LEASE_S") or LEASE_S
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"MILLSTREAM_LEASE_S={text!r} must be a number of seconds") from None


def state_folder(state: str | os.PathLike[str] | None = None) -> Path:
    """The folder where an embedded server keeps its data and address: `state`, MILLSTREAM_STATE, or ./.millstream."""
    return Path(state or os.environ.get("MILLSTREAM_STATE") or STATE_FOLDER)


def read_advert(state: str | os.PathLike[str] | None = None) -> dict[str, Any] | None:
    """What the embedded server of this state folder says about itself, or None when none has been started."""
    try:
        advert: dict[str, Any] = json.loads((state_folder(state) / ADVERT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise ConfigError(
            f"{state_folder(state) / ADVERT} is not readable JSON ({e}); delete it and start again"
        ) from e
    return advert


@dataclass(frozen=True, slots=True)
class AutoscalingConfig:
    """How many replicas a deployment may have, and what decides within that.

    Field names and meanings are Ray Serve's. `policy="backlog"` (rate plus backlog, Little's law) is the default;
    `policy="ray"` is Ray's formula, look-back and delays.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    initial_replicas: int | None = None
    target_ongoing_requests: float = 2.0
    policy: Literal["backlog", "ray"] = "backlog"
    target_queue_latency_s: float = 1.0  # how long a request may wait in the queue before we buy more replicas
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 300.0  # hold: shrink only to the most that was wanted in this window
    downscale_to_zero_delay_s: float | None = None  # None: downscale_delay_s
    look_back_period_s: float = 30.0  # policy="ray" only
    upscaling_factor: float = 1.0  # policy="ray" only
    downscaling_factor: float = 1.0  # policy="ray" only

    def __post_init__(self) -> None:
        _at_least(self, "min_replicas", 0)
        _at_least(self, "max_replicas", 1)
        if self.max_replicas < self.min_replicas:
            raise ConfigError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")
        if self.initial_replicas is not None:
            _at_least(self, "initial_replicas", 0)
        initial = self.initial_replicas
        if initial is not None and not self.min_replicas <= initial <= self.max_replicas:
            raise ConfigError(
                f"initial_replicas={initial} is outside min_replicas={self.min_replicas} "
                f"to max_replicas={self.max_replicas}"
            )
        for name in ("target_ongoing_requests", "target_queue_latency_s", "look_back_period_s"):
            _above(self, name, 0)
        for name in ("upscaling_factor", "downscaling_factor"):
            _above(self, name, 0)
        for name in ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"):
            if getattr(self, name) is not None:
                _at_least(self, name, 0)
        if self.policy not in ("backlog", "ray"):
            raise ConfigError(f"policy={self.policy!r} is unknown; use 'backlog' or 'ray'")

    @property
    def to_zero_delay_s(self) -> float:
        delay = self.downscale_to_zero_delay_s
        return self.downscale_delay_s if delay is None else delay


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """Everything about a deployment but its code. Defaults are the table in the README's reference."""

    num_replicas: int = 1  # ignored where `autoscaling` is set
    autoscaling: AutoscalingConfig | None = None
    max_ongoing_requests: int | None = None  # None: 100 if any public method is async, else sync_threads
    sync_threads: int = 1
    max_queued_requests: int | None = None  # waiting in the queue, for all callers together; None: no limit (Ray's -1)
    request_timeout_s: float | None = None  # from submission to result, where the caller sets no timeout_s
    max_attempts: int = 3  # attempts ended by the death of a replica; 1 is Ray's behaviour
    retry: Retry | None = None  # attempts ended by an exception, counted apart; a number is short for Retry(number)
    result_ttl_s: float = 3600.0
    user_config: Any = None
    health_check_period_s: float = 10.0  # Ray's; between two calls of the user's check_health
    health_check_timeout_s: float = 30.0
    graceful_shutdown_timeout_s: float = 20.0
    start_method: Literal["fork", "spawn"] | None = None  # None: fork, unless the application started threads
    resources: dict[str, float] = field(default_factory=dict)  # of one replica: on record, not used by placement yet
    version: str | None = None  # Ray's; another one restarts the replicas, whatever else stayed the same

    def __post_init__(self) -> None:
        _at_least(self, "num_replicas", 0)
        if self.max_ongoing_requests is not None:
            _at_least(self, "max_ongoing_requests", 1)
        if self.max_queued_requests is not None:
            _at_least(self, "max_queued_requests", 1)
        if self.request_timeout_s is not None:
            _at_least(self, "request_timeout_s", 0.001)
        _at_least(self, "sync_threads", 1)
        _at_least(self, "max_attempts", 1)
        object.__setattr__(self, "retry", Retry.of(self.retry))
        _at_least(self, "result_ttl_s", 1)
        _above(self, "health_check_period_s", 0)
        _above(self, "health_check_timeout_s", 0)
        _at_least(self, "graceful_shutdown_timeout_s", 0)
        try:
            json.dumps(self.user_config)
        except (TypeError, ValueError) as e:
            raise ConfigError(f"user_config must be JSON-able: {e}") from None
        if self.start_method not in (None, "fork", "spawn"):
            raise ConfigError(f"start_method={self.start_method!r} is unknown; use 'fork', 'spawn' or None")
        if self.version is not None and not isinstance(self.version, str):
            raise ConfigError(f"version={self.version!r} must be a text")
        _check_resources(self.resources)

    @property
    def of_the_process(self) -> dict[str, Any]:
        """What a running replica cannot change: another value means another process."""
        return {name: getattr(self, name) for name in sorted(RESTARTING)}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        values = json.loads(text)
        if values.get("autoscaling") is not None:
            values["autoscaling"] = AutoscalingConfig(**values["autoscaling"])
        values["retry"] = Retry.of(values.get("retry"))
        return cls(**values)

    def updated(self, options: dict[str, Any]) -> Self:
        """A copy with `options` as `@serve.deployment` and `.options()` take them: Ray's names and aliases included."""
        return replace(self, **_translate(options))


# A redeploy that changes only IN_PLACE fields keeps the replicas. Whoever adds a field decides where it belongs.
IN_PLACE = frozenset(
    {
        "num_replicas", "autoscaling", "max_ongoing_requests", "max_attempts", "result_ttl_s", "user_config",
        "health_check_period_s", "health_check_timeout_s", "graceful_shutdown_timeout_s", "max_queued_requests",
        "request_timeout_s", "retry",
    }
)  # fmt: skip
RESTARTING = frozenset({"sync_threads", "start_method", "resources", "version"})

# Options of Ray Serve that mean nothing without a Ray cluster or an HTTP proxy: accepted, so that code ports unchanged.
IGNORED_OPTIONS = frozenset({"route_prefix", "logging_config", "graceful_shutdown_wait_loop_s"})
RESOURCES = ("num_cpus", "num_gpus")


def _check_resources(resources: Any) -> None:
    if not isinstance(resources, dict):
        raise ConfigError(f"resources={resources!r} must be a dict, as in {{'num_cpus': 1, 'num_gpus': 0.5}}")
    for name, amount in resources.items():
        if name not in RESOURCES:
            raise ConfigError(f"resources has {name!r}, which means nothing here; known are {', '.join(RESOURCES)}")
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
            raise ConfigError(f"resources[{name!r}]={amount!r} must be a number, 0 or more")


def _translate(options: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in options.items() if name not in IGNORED_OPTIONS}
    for_actors = values.pop("ray_actor_options", None)  # Ray's name for the same
    if for_actors is not None:
        if "resources" in values:
            raise ConfigError(
                f"resources={values['resources']!r} and ray_actor_options={for_actors!r} are two names for one thing; drop one"
            )
        values["resources"] = for_actors
    if values.get("num_replicas", 1) is None:
        del values["num_replicas"]  # Ray's way to say "not a fixed number"
    if "max_concurrent_queries" in values:
        values["max_ongoing_requests"] = values.pop("max_concurrent_queries")
    if values.get("max_queued_requests") == -1:
        values["max_queued_requests"] = None  # Ray's way to say "no limit"
    scaling = values.pop("autoscaling_config", None)
    if values.get("num_replicas") == "auto":
        del values["num_replicas"]
        scaling = {"min_replicas": 1, "max_replicas": 100, **_as_dict(scaling)}
    elif "num_replicas" in values and scaling is not None:
        raise ConfigError(f"num_replicas={values['num_replicas']} and autoscaling_config exclude each other; drop one")
    if values.get("num_replicas") is not None:
        values.setdefault("autoscaling", None)  # a fixed number ends the autoscaling it is set over
    if scaling is not None:
        values["autoscaling"] = AutoscalingConfig(**_checked(AutoscalingConfig, _renamed(_as_dict(scaling))))
    return _checked(DeploymentConfig, values)


# Fields of Ray's AutoscalingConfig under the names they had before; metrics are read here, nobody has to push them.
_FORMER = {
    "target_num_ongoing_requests_per_replica": ("target_ongoing_requests",),
    "smoothing_factor": ("upscaling_factor", "downscaling_factor"),
    "upscale_smoothing_factor": ("upscaling_factor",),
    "downscale_smoothing_factor": ("downscaling_factor",),
    "metrics_interval_s": (),
}


def _renamed(scaling: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in scaling.items() if value is not None}  # None is Ray's "by default"
    renamed = {new: given[old] for old, news in _FORMER.items() if old in given for new in news}
    return {**renamed, **{name: value for name, value in given.items() if name not in _FORMER}}


def _as_dict(scaling: Any) -> dict[str, Any]:
    if scaling is None:
        return {}
    if isinstance(scaling, AutoscalingConfig):
        return asdict(scaling)
    if not isinstance(scaling, dict):
        raise ConfigError(f"autoscaling_config must be a dict or AutoscalingConfig, not {type(scaling).__name__}")
    return scaling


def _checked(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    known = [f.name for f in fields(cls)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; known are {', '.join(known)}")
    return values


def _number(owner: object, name: str) -> float:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} must be a number")
    if "int" in str(type(owner).__annotations__[name]) and not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} must be a whole number")
    return value


def _at_least(owner: object, name: str, least: float) -> None:
    if _number(owner, name) < least:
        raise ConfigError(f"{name}={getattr(owner, name)} must be at least {least}")


def _above(owner: object, name: str, bound: float) -> None:
    if _number(owner, name) <= bound:
        raise ConfigError(f"{name}={getattr(owner, name)} must be above {bound}")
