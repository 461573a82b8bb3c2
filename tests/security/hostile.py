"""Bytes that somebody writes to Redis who does not have the secret."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from millstream.broker import pickling
from millstream.broker.codec import codec_for

REF = b"r" * 22
Enemy = Any  # a blocking client; redis-py's reply types change from release to release
OVERSIZED_BYTES = 100_000  # more than an entry or a result ever has; hypothesis writes examples out


def fuzzed(examples: int) -> hypothesis_settings:
    """The same examples each time. Fixtures are shared by all of them: a server, replicas."""
    return hypothesis_settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Canary:
    """Pickles as an order to make a folder."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)

    @property
    def is_alive(self) -> bool:
        return not self.path.exists()

    @property
    def bomb(self) -> bytes:
        """A pickle that kills the canary."""
        return pickle.dumps(((self,), {}), 5)

    def envelopes(self, namespace: str, tag: str, ref: bytes, method: bytes = b"") -> list[bytes]:
        """The bomb in every envelope that somebody without the secret can make; of all kinds."""
        with_buffers = b"\x01\0\0\0" + (3).to_bytes(8, "little") + self.bomb + b"abc"
        forged = [
            b"\x01p" + bytes(16) + self.bomb,
            b"\x01b" + bytes(16) + with_buffers,
            self.bomb,
            b"\x01j" + self.bomb,
        ]
        for key in (b"another secret", b"\0"):
            codec = codec_for(key, namespace, tag)
            forged += [codec.seal(kind, ref, self.bomb, method) for kind in ("request", "value", "error", "item")]
        return forged


def damaged(genuine: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are nearly the genuine ones: cut off, longer, or with some of them changed."""
    at = st.integers(0, len(genuine) - 1)

    def flipped(changes: list[tuple[int, int]]) -> bytes:
        whole = bytearray(genuine)
        for position, change in changes:
            whole[position] ^= change
        return bytes(whole)

    return st.one_of(
        at.map(lambda end: genuine[:end]),
        st.binary(min_size=1, max_size=64).map(lambda more: genuine + more),
        st.lists(st.tuples(at, st.integers(1, 255)), min_size=1, max_size=4, unique_by=lambda c: c[0]).map(flipped),
        st.tuples(at, at).map(lambda cut: genuine[: min(cut)] + genuine[max(cut) + 1 :]),
    )


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"", b"\0", b"{}", b"[]", b"null", b"-1", b"nan", b"@", b"@x\n", b"@99999999999999999999\n", b"\xff\xfe\xfd",
            b"open", b"unknown", b"parked", b"delayed",
        ]
    ),
    # By what they are made of: hypothesis prints its strategies.
    st.sampled_from([(b"1", 400), (b"[", 5000), (b'{"a":', 3000), (b"x", OVERSIZED_BYTES)]).map(lambda of: of[0] * of[1]),
)  # fmt: skip


@contextmanager
def nothing_is_loaded(monkeypatch: Any) -> Iterator[list[bytes]]:
    """Within, whatever is unpickled is in this list."""
    loaded: list[bytes] = []
    load = pickling.load

    def watched(data: Any, **more: Any) -> Any:
        loaded.append(bytes(data))
        return load(data, **more)

    with monkeypatch.context() as patch:
        patch.setattr(pickling, "load", watched)
        yield loaded
