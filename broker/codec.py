"""The signed envelope around every pickled (or JSON) body that goes through Redis.

    byte 0      version, 1
    byte 1      "p" pickle, "b" pickle with its large buffers beside it, or "j" JSON
    bytes 2-17  BLAKE2b of 16 bytes, keyed with the secret, personalised with the kind, over
                namespace 0 tag 0 format length method length ref body
                (0 is a zero byte, a length is one byte; method is empty but for requests, and for items of a stream,
                where it is the item's number)
    bytes 18-   body; with "b": the number of buffers (4 bytes), the length of each (8 bytes; little-endian all), the
                pickle and what it takes for the first buffer to be aligned, the buffers (PEP 574)

Whoever moves a body to another ref, method, deployment, namespace or kind breaks its signature. Nothing is unpickled
before it was verified.
"""

import base64
import hashlib
import hmac
import json
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from millstream.broker import pickling
from millstream.broker.pickling import Pickled
from millstream.errors import SignatureError

HEADER_BYTES = 18
REF_BYTES = 22  # of all refs but those that some other program has made
ALIGNMENT = 16  # of buffers, in memory: as malloc has it. The first one in an envelope lies so.
Kind = Literal["request", "value", "error", "definition", "check", "item", "key"]


class Codec:
    """Seals and opens the bodies of one deployment (or `put` tag). Get one with `codec_for`."""

    __slots__ = ("_seeds", "open_value", "seal_value", "tag")

    def __init__(self, secret_key: bytes, namespace: str, tag: str) -> None:
        self.tag = tag
        subject = f"{namespace}\0{tag}\0".encode()
        # A copy of a keyed and fed hash costs 1.1 us where a new one costs 1.9.
        self._seeds = {
            kind: hashlib.blake2b(subject, key=secret_key, digest_size=16, person=f"ms {kind}".encode())
            for kind in ("request", "value", "error", "definition", "check", "item", "key")
        }
        self.open_value, self.seal_value = self.opener("value"), self.sealer("value")

    def _sign(self, kind: Kind, method: bytes, ref: bytes, form: bytes, body: bytes | memoryview) -> bytes:
        seed = self._seeds[kind].copy()
        seed.update(b"%b%c%b%c%b" % (form, len(method), method, len(ref), ref))
        seed.update(body)
        return seed.digest()

    def seal(self, kind: Kind, ref: bytes, body: bytes, method: bytes = b"") -> bytes:
        """The envelope of a pickled body."""
        seed = self._seeds[kind].copy()  # `_sign` written out: twice per request
        seed.update(b"p%c%b%c%b" % (len(method), method, len(ref), ref))
        seed.update(body)
        return b"\x01p%b%b" % (seed.digest(), body)

    def sealer(self, kind: Kind, method: bytes = b"") -> Callable[[bytes, bytes], bytes]:
        """`seal(ref, body)` of one kind and method, for refs of REF_BYTES: what they have in common is worked out here,
        once, and that is half of it."""
        seed = self._seeds[kind].copy()
        seed.update(b"p%c%b%c" % (len(method), method, REF_BYTES))
        copy = seed.copy

        def seal(ref: bytes, body: bytes) -> bytes:
            one = copy()
            one.update(ref + body)
            return b"\x01p" + one.digest() + body

        return seal

    def opener(self, kind: Kind, method: bytes = b"") -> Callable[[bytes, bytes], Any]:
        """`open(ref, envelope)` of one kind and method, as `sealer`; any ref and envelope will do."""
        if len(method) > 255:  # no such envelope is good
            return partial(self.open, kind, method=method)
        seed = self._seeds[kind].copy()
        seed.update(b"p%c%b%c" % (len(method), method, REF_BYTES))
        copy, verified = seed.copy, self.verified

        def open_(ref: bytes, envelope: bytes) -> Any:
            if envelope[:2] == b"\x01p" and len(ref) == REF_BYTES and len(envelope) <= pickling.LARGE_BYTES:
                body, one = envelope[HEADER_BYTES:], copy()
                one.update(ref + body)
                if hmac.compare_digest(one.digest(), envelope[2:HEADER_BYTES]):
                    return pickling.load(body)
            return verified(kind, ref, envelope, method).load()

        return open_

    def seal_parts(self, kind: Kind, ref: bytes, pickled: Pickled, method: bytes = b"") -> list[bytes | memoryview]:
        """The envelope of a large body, in parts to be written one after the other: nothing is copied."""
        form = b"b" if pickled.buffers else b"p"
        parts: list[bytes | memoryview] = [pickled.data, *pickled.buffers]
        if pickled.buffers:
            sizes = [len(buffer) for buffer in pickled.buffers]
            parts.insert(0, struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            if sizes[0] > pickling.LARGE_BYTES:  # else it was not `dump_parts` that made them
                parts.insert(2, bytes(-(HEADER_BYTES + len(parts[0]) + len(pickled.data)) % ALIGNMENT))
        seed = self._seeds[kind].copy()
        seed.update(b"%b%c%b%c%b" % (form, len(method), method, len(ref), ref))
        for part in parts:
            seed.update(part)
        return [b"\x01%b%b" % (form, seed.digest()), *parts]

    def ref_of_key(self, idempotency_key: str) -> bytes:
        """The ref that an idempotency key stands for, the same in every process: 22 characters."""
        seed = self._seeds["key"].copy()
        seed.update(idempotency_key.encode())
        return base64.urlsafe_b64encode(seed.digest())[:22]

    def seal_json(self, kind: Kind, ref: bytes, value: Any, method: bytes = b"") -> bytes:
        """The envelope of a JSON body; for callers in other languages."""
        body = json.dumps(value).encode()
        return b"\x01j%b%b" % (self._sign(kind, method, ref, b"j", body), body)

    def open(self, kind: Kind, ref: bytes, envelope: bytes, method: bytes = b"") -> Any:
        """Verify and decode. Raises SignatureError, and then has not looked at the body."""
        # `verify` written out: twice per request
        if envelope[:2] == b"\x01p" and len(method) < 256 > len(ref) and len(envelope) <= pickling.LARGE_BYTES:
            body = envelope[HEADER_BYTES:]
            seed = self._seeds[kind].copy()
            seed.update(b"p%c%b%c%b" % (len(method), method, len(ref), ref))
            seed.update(body)
            if hmac.compare_digest(seed.digest(), envelope[2:HEADER_BYTES]):
                return pickling.load(body)
        return self.verified(kind, ref, envelope, method).load()

    def verify(self, kind: Kind, ref: bytes, envelope: bytes, method: bytes = b"") -> tuple[bytes, bytes]:
        """(form, body) of an envelope that is what it claims to be. Raises SignatureError."""
        form, view = self.verified(kind, ref, envelope, method)
        return form, bytes(view)

    def verified(self, kind: Kind, ref: bytes, envelope: bytes | memoryview, method: bytes = b"") -> "Verified":
        """As `verify`, of a body that may be half a gigabyte: it is not copied. In any thread."""
        whole = memoryview(envelope)
        form, view = bytes(whole[1:2]), whole[HEADER_BYTES:]
        if len(method) > 255 or len(ref) > 255:
            raise self._refusal(kind, ref, "names a method or ref longer than 255 bytes")
        if bytes(whole[:1]) != b"\x01" or form not in (b"p", b"b", b"j"):
            raise self._refusal(kind, ref, "is not an envelope of version 1")
        if not hmac.compare_digest(self._sign(kind, method, ref, form, view), whole[2:HEADER_BYTES]):
            raise self._refusal(kind, ref, "does not bear this installation's signature")
        return Verified(form, view)

    def _refusal(self, kind: str, ref: bytes, why: str) -> SignatureError:
        ref_id = f"{self.tag}~{ref.decode(errors='replace')}"
        return SignatureError(
            f"the {kind} stored for {ref_id} {why} and was not opened; "
            "check that every process uses the same MILLSTREAM_SECRET_KEY",
            ref_id=ref_id,
        )


class Verified(NamedTuple):
    """A body whose signature was found good. Only a codec makes one."""

    form: bytes
    body: memoryview

    def shared(self) -> "Verified":
        """The same for several: each `load` makes arrays of its own, where it would make them of this memory."""
        return self._replace(body=self.body.toreadonly())

    def load(self) -> Any:
        """The value. Its large arrays are made of the very bytes that came, so that nobody else may load it."""
        if self.form == b"b":
            return _load_with_buffers(self.body)
        return pickling.load(self.body) if self.form == b"p" else json.loads(bytes(self.body))


def _load_with_buffers(body: memoryview) -> Any:
    """Unpickle a body whose large buffers lie beside the pickle. Arrays can be written to: they are made of the body's own
    memory, and of copies where that may not be written, or where a buffer does not lie as an array should."""
    (count,) = struct.unpack_from("<I", body)
    sizes = struct.unpack_from(f"<{count}Q", body, 4)
    rest = body[4 + 8 * count :]
    start = len(rest) - sum(sizes)
    buffers, data = [], rest[:start]
    for size in sizes:
        buffer = rest[start : start + size]
        is_aligned = (HEADER_BYTES + 4 + 8 * count + start) % ALIGNMENT == 0
        buffers.append(buffer if is_aligned and not body.readonly else bytearray(buffer))
        start += size
    return pickling.load(data, buffers=buffers)


@lru_cache(maxsize=4096)
def codec_for(secret_key: bytes, namespace: str, tag: str) -> Codec:
    """The codec of one deployment; made once per process."""
    return Codec(secret_key, namespace, tag)
