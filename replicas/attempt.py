"""One stream entry in the hands of a replica: a request, and what is special about it."""

from typing import NamedTuple

from millstream.broker import outcomes
from millstream.retry import Retry

# Fields of an entry that only say something about it. With any other, it takes more than one step to start.
SIMPLE = frozenset(
    (
        b"ref", b"method", b"reply", b"body", b"want", b"kill",
        b"attempt", b"history", b"lane", b"max_attempts", b"retry", b"retries",
    )
)  # fmt: skip
NUMBERS = frozenset({b"deadline", b"attempt", b"retries", b"stream", b"payload", b"max_attempts"})
USUAL_FIELDS = 8  # names and values: as submit writes a request that has nothing special, with its ref first
MOST_REF_BYTES = 255  # as an envelope can name it
MOST_DIGITS = 15
MOST_FIELDS = 3950  # a request can wait for 3900 refs at most (`hold`); a script hands over 8000 arguments at most


class Attempt(NamedTuple):
    """One stream entry in the hands of this replica."""

    lane: str
    entry: bytes
    ref: bytes
    method: bytes
    client: bytes
    body: bytes
    more: dict[bytes, bytes]  # all fields, of a request that has some beyond the usual; else empty

    @property
    def place(self) -> tuple[str, bytes]:
        return self.lane, self.entry

    @property
    def deadline_ms(self) -> int | None:
        """On the server's clock."""
        return int(self.more[b"deadline"]) if b"deadline" in self.more else None

    @property
    def supplied(self) -> dict[str, bytes]:
        """ref id -> stored value, of the refs among its arguments."""
        return {name[4:].decode(): value for name, value in self.more.items() if name[:4] == b"dep:"}

    @property
    def retries(self) -> int:
        """How many of its attempts have ended because its code raised."""
        return int(self.more.get(b"retries", b"0"))

    @property
    def retry(self) -> Retry | None:
        """What its caller says about trying it again."""
        return Retry.from_json(self.more[b"retry"]) if b"retry" in self.more else None

    def small_values(self) -> dict[str, bytes] | None:
        """As `supplied`, if that is all that is special about the request, and none is large; else None."""
        for name, value in self.more.items():
            if name not in SIMPLE and (name[:4] != b"dep:" or outcomes.large_part(value) is not None):
                return None
        return self.supplied

    @property
    def max_ahead(self) -> int | None:
        """Of a stream: how many items may be produced before they are read. None: no stream is asked for."""
        return int(self.more[b"stream"]) if b"stream" in self.more else None


def read_entry(lane: str, entry: bytes, fields: list[bytes]) -> Attempt:
    """From the fields of a stream entry. Raises KeyError or ValueError if it is not a request."""
    is_usual = len(fields) == USUAL_FIELDS and fields[0] == b"ref" and fields[6] == b"body"  # as submit writes it
    if is_usual and len(fields[1]) <= MOST_REF_BYTES:
        return Attempt(lane, entry, fields[1], fields[3], fields[5], fields[7], _NOTHING)
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    if len(named) > MOST_FIELDS:
        raise ValueError(f"it has {len(named)} fields")
    if len(named[b"ref"]) > MOST_REF_BYTES:
        raise ValueError("its ref is longer than an envelope can name")
    if not (named[b"ref"] + named[b"method"] + named[b"reply"]).isascii():
        raise ValueError("its ref, method or client is no plain text")
    for name in NUMBERS & named.keys():
        if not (named[name].isdigit() and len(named[name]) <= MOST_DIGITS):
            raise ValueError(f"its {name.decode()} is {named[name][:50]!r}")
    if b"retry" in named:
        Retry.from_json(named[b"retry"])
    return Attempt(lane, entry, named[b"ref"], named[b"method"], named[b"reply"], named[b"body"], named)


_NOTHING: dict[bytes, bytes] = {}
