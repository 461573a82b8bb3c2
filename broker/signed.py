"""Signs the records by which processes tell each other what to do, so that only who has the secret can have them obeyed.

A signed record is one line of text that redis-cli shows as it is, `<32 hex digits> <JSON>`. The digits are a BLAKE2b of
16 bytes, keyed with the secret, personalised with the kind, over

    namespace 0, then length (4 bytes, big-endian) and text of each part of its place, then the JSON

The place says where a record stands: whoever moves it to another application, deployment, node or replica, or puts an
old config under a new revision, breaks its signature. Scripts pass such texts on; they never look into them.
"""

import hashlib
import hmac
import json
from dataclasses import asdict
from typing import Any, Literal, get_args

from millstream.broker.records import AppRecord, NodeRecord, Planned, R, ReplicaRecord, read_record
from millstream.config import Settings
from millstream.errors import SignatureError

Kind = Literal["app", "config", "plan", "override", "node", "replica"]
KINDS: dict[type, Kind] = {AppRecord: "app", NodeRecord: "node", Planned: "plan", ReplicaRecord: "replica"}
DIGEST_BYTES = 16
UNREADABLE = (SignatureError, ValueError)  # what reading a record may raise
_MENDED_BY: dict[Kind, str] = {
    "app": "then deploy the application again",
    "config": "then deploy its application again",
    "plan": "the autoscaler writes it anew by itself",
    "override": "then give the order again (`millstream scale`)",
    "node": "its launcher writes it anew by itself",
    "replica": "then end that replica: another one takes its place",
}


class Signer:
    """Writes and reads the signed records of one installation."""

    __slots__ = ("_seeds",)

    def __init__(self, settings: Settings) -> None:
        subject = f"{settings.namespace}\0".encode()
        self._seeds = {
            kind: hashlib.blake2b(
                subject, key=settings.secret_key, digest_size=DIGEST_BYTES, person=f"ms {kind}".encode()
            )
            for kind in get_args(Kind)
        }

    def write(self, record: AppRecord | NodeRecord | Planned | ReplicaRecord, *place: str) -> str:
        """A record as it is stored at its place."""
        values = record._asdict() if isinstance(record, Planned) else asdict(record)
        return self.sign(KINDS[type(record)], json.dumps(values), *place)

    def read(self, cls: type[R], stored: bytes, *place: str) -> R:
        """The record that stands at this place. SignatureError if nobody with the secret has put it there, ValueError
        if it is none."""
        return read_record(cls, self.verified(KINDS[cls], stored, *place))

    def sign(self, kind: Kind, text: str, *place: str) -> str:
        return f"{self._digits(kind, text.encode(), place).decode()} {text}"

    def verified(self, kind: Kind, stored: bytes, *place: str) -> bytes:
        """The text that was signed. Raises SignatureError, and then has not looked at it."""
        digits, _, text = stored.partition(b" ")
        if not hmac.compare_digest(digits, self._digits(kind, text, place)):
            raise SignatureError(
                f"the {kind} stored for {' / '.join(place)!r:.200} does not bear this installation's signature and is not "
                "obeyed: it was changed, moved there, or written with another MILLSTREAM_SECRET_KEY; "
                f"see who else writes to this server, {_MENDED_BY[kind]}"
            )
        return text

    def _digits(self, kind: Kind, text: bytes, place: tuple[str, ...]) -> bytes:
        seed: Any = self._seeds[kind].copy()
        for part in map(str.encode, place):
            seed.update(len(part).to_bytes(4) + part)
        seed.update(text)
        digits: str = seed.hexdigest()
        return digits.encode()
