"""What stands under a result key, read and written: "<state> <lane> <entry id>", a newline, then the body.

Values and user errors are signed envelopes; the reason of a dead letter is plain JSON written by a script.
"""

import json
import pickle
from typing import Any

from millstream.broker import pickling, remote_errors
from millstream.broker.codec import Codec, Verified
from millstream.errors import (
    BackPressureError,
    DeployFailedError,
    DeploymentNotFoundError,
    MillstreamError,
    RefNotFoundError,
    ReplicaDiedError,
    RequestCancelledError,
    RequestTimeoutError,
    SignatureError,
)

ENDED_TTL_S = 3600  # of what was cancelled or timed out: its deployment's result_ttl_s is not at hand
_OF_AN_ATTEMPT = {"attempt", "replica", "cause", "at_ms"}
OVERDUE = "its deadline passed"


def is_running(stored: bytes) -> bool:
    """True for a matched notice: a replica has taken the request."""
    return stored[:7] == b"running"


def is_item(stored: bytes) -> bool:
    """True for an item of a stream: "item <number>", a newline, its envelope, a newline."""
    return stored[:5] == b"item "


def large_part(stored: bytes) -> str | None:
    """Where the value lies in a key of its own: the last part of that key's name (`DeploymentKeys.value`)."""
    header, _, body = stored.partition(b"\n")
    if body[:1] != b"@" or not header.startswith(
        (b"succeeded", b"item ")
    ):  # the rest is text, and may begin with anything
        return None
    size_and_part = body.split()  # of an item it is said: it is not its number alone
    part = size_and_part[1] if len(size_and_part) > 1 else header.rpartition(b" ")[2]
    return part.decode(errors="replace")  # not ours, if it is no text: then nothing is found there


def large_size(stored: bytes) -> int:
    """Of what `large_part` finds elsewhere: the number of bytes there. SignatureError if it is none that a value can have."""
    size = stored.partition(b"\n")[2].split()[0][1:]
    # An envelope is a little longer than the value in it, whose limit may be higher where it was made.
    if not size.isdigit() or len(size) > 15 or not 0 < int(size) <= 2 * pickling.limit_bytes():
        raise SignatureError(f"a large value is said to have {size[:50]!r} bytes: that was not written by millstream")
    return int(size)


def open_stored(codec: Codec, ref: bytes, stored: bytes, large: bytes | Verified | None = None) -> Any:
    """The value under a result key, or the error it stands for, raised. SignatureError if it was tampered with.

    `large` is what lies under the key that `large_part` names, verified already or not; None if that has expired, which
    is a RefNotFoundError.
    """
    body = stored[stored.find(b"\n") + 1 :]
    if stored[:9] == b"succeeded":
        if body[:1] == b"@" and large is None:
            raise not_found(f"{codec.tag}~{ref.decode()}", f"its value ({large_size(stored)} bytes) has expired")
        try:
            if isinstance(large, Verified):
                return large.load()
            return codec.open_value(ref, body if large is None else large)
        except (ImportError, AttributeError) as e:
            e.add_note(f"the value of {codec.tag}~{ref.decode()} is of a class that cannot be imported here")
            raise
    header = stored.partition(b"\n")[0]
    if header[:6] == b"failed":
        raise remote_errors.rebuild(codec.open("error", ref, body), f"{codec.tag}~{ref.decode()}")
    if header[:4] == b"dead":
        raise died(codec.tag, ref, body)
    if header[:9] == b"cancelled":
        raise cancelled(codec.tag, ref, body)
    if header[:9] == b"timed_out":
        raise timed_out(codec.tag, ref, body)
    raise not_found(
        f"{codec.tag}~{ref.decode()}", f"its result is in a state unknown to this version: {header[:100]!r}"
    )


def error_body(codec: Codec, ref: bytes, stored: bytes) -> bytes:
    """The error of an ended request as an unsigned body, to be signed for one that depends on it. Nothing is unpickled."""
    header, _, body = stored.partition(b"\n")
    if header[:6] == b"failed":
        form, record = codec.verify("error", ref, body)
        return record if form == b"p" else pickle.dumps(json.loads(record))
    if header[:4] == b"dead":
        return remote_errors.capture(died(codec.tag, ref, body))
    if header[:9] == b"timed_out":
        return remote_errors.capture(timed_out(codec.tag, ref, body))
    return remote_errors.capture(cancelled(codec.tag, ref, body))


def died(tag: str, ref: bytes, body: bytes) -> ReplicaDiedError:
    ref_id = f"{tag}~{ref.decode()}"
    attempts = read_history(body)
    if not attempts:
        return ReplicaDiedError(
            f"request {ref_id} is a dead letter, and what stands there of its attempts was not written by millstream; "
            "look at it with `millstream dead list`",
            ref_id=ref_id,
            attempts=[],
        )
    last = attempts[-1]
    return ReplicaDiedError(
        f"request {ref_id} was running on replica {last['replica']} when it died ({last['cause']}), "
        f"and that was attempt {last['attempt']}, the last one it had; look at the replica's output, "
        "then send it again (`millstream dead requeue`) or raise max_attempts",
        ref_id=ref_id,
        attempts=attempts,
    )


def read_history(text: bytes | str) -> list[dict[str, Any]]:
    """How the attempts of a request have ended; nothing, if that was not written by one of our scripts."""
    try:
        attempts = json.loads(text)
    except (ValueError, RecursionError):
        return []
    is_ours = isinstance(attempts, list) and all(
        isinstance(one, dict) and one.keys() >= _OF_AN_ATTEMPT for one in attempts
    )
    return attempts if is_ours else []


def cancelled(tag: str, ref: bytes, body: bytes) -> RequestCancelledError:
    ref_id = f"{tag}~{ref.decode()}"
    return RequestCancelledError(f"request {ref_id} was cancelled: {body.decode(errors='replace')}", ref_id=ref_id)


def timed_out(tag: str, ref: bytes, body: bytes) -> RequestTimeoutError:
    ref_id = f"{tag}~{ref.decode()}"
    return RequestTimeoutError(
        f"request {ref_id} had no result in time: {body.decode(errors='replace')}; "
        "send it again with a longer timeout_s, or look at the backlog with `millstream status`",
        ref_id=ref_id,
    )


def queue_full(tag: str) -> BackPressureError:
    return BackPressureError(
        f"deployment {tag} has as many requests waiting as its max_queued_requests allows; try again later, add replicas, "
        'or let the handle wait: options(when_full="wait")',
        deployment=tag,
    )


def not_found(ref_id: str, why: str = "it expired, was dropped, or never existed on this server") -> RefNotFoundError:
    return RefNotFoundError(f"ref {ref_id} has no result here: {why}; submit the request again", ref_id=ref_id)


def same_kind(error: BaseException) -> BaseException:
    """A copy of one of our errors to raise once more, so that tracebacks of several callers do not pile up."""
    if type(error).__module__ == "millstream.errors" and isinstance(error, MillstreamError):
        return type(error)(str(error), **error.__dict__)
    return error


def no_such_deployment(tag: str) -> DeploymentNotFoundError:
    app, _, name = tag.partition(".")
    return DeploymentNotFoundError(
        f"there is no deployment {name!r} in application {app!r}; "
        "`millstream status` lists what is deployed, serve.run(...) deploys",
        app=app,
        deployment=name,
    )


def deploy_failed(tag: str, message: str, remote_traceback: str) -> DeployFailedError:
    return DeployFailedError(
        f"deployment {tag} cannot start: {message}; mend it and deploy again\n{remote_traceback}".rstrip(),
        deployment=tag,
        remote_traceback=remote_traceback,
    )
