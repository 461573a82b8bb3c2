"""The signed envelope around every pickled (or JSON) body that goes through Redis.

    byte 0      version, 1
    byte 1      "p" pickle, "b" large pickle with its large buffers beside it, or "j" JSON
    bytes 2-17  BLAKE2b of 16 bytes, keyed with the secret, personalised with the kind, over
                namespace 0 tag 0 format length method length ref body
                (0 is a zero byte, a length is one byte; method is empty but for requests, and for items of a stream,
                where it is the item's number); with "b", the SHA-256 of the body in place of the body
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

    def sealing(self, kind: Kind, ref: bytes, pickled: Pickled, method: bytes = b"") -> "Sealing":
        """The envelope of a large body: nothing is copied, or signed yet."""
        sizes = [len(buffer) for buffer in pickled.buffers]
        head = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        parts: list[bytes | memoryview] = [head, pickled.data, *pickled.buffers]
        if sizes and sizes[0] > pickling.LARGE_BYTES:  # else it was not `dump_parts` that made them
            parts.insert(2, bytes(-(HEADER_BYTES + len(head) + len(pickled.data)) % ALIGNMENT))
        return Sealing(_Signature(self.seed(kind), b"b", ref, method), parts)

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
        opening, whole = self.opening(kind, ref, method), memoryview(envelope)
        opening.update(whole)
        return opening.verified(whole)

    def opening(self, kind: Kind, ref: bytes, method: bytes = b"") -> "Opening":
        """As `verified`, of an envelope that comes bit by bit."""
        return Opening(self, kind, ref, method)

    def seed(self, kind: Kind) -> Any:
        """A hash that is keyed, and fed with what all bodies of this kind have in common."""
        return self._seeds[kind].copy()

    def refusal(self, kind: str, ref: bytes, why: str) -> SignatureError:
        ref_id = f"{self.tag}~{ref.decode(errors='replace')}"
        return SignatureError(
            f"the {kind} stored for {ref_id} {why} and was not opened; "
            "check that every process uses the same MILLSTREAM_SECRET_KEY",
            ref_id=ref_id,
        )


class Sealing(NamedTuple):
    """The envelope of a large body in the making: `parts`, and before them what `sign` gives."""

    signature: "_Signature"
    parts: list[bytes | memoryview]

    @property
    def size_bytes(self) -> int:
        return HEADER_BYTES + sum(map(len, self.parts))

    def sign(self) -> bytes:
        """The first HEADER_BYTES of the envelope, by the parts as they are now. Takes 1 to 2 ms per MB. In any thread."""
        signature = self.signature.copy()
        for part in self.parts:
            signature.update(part)
        return b"\x01b%b" % signature.digest()


class _Signature:
    """Of a body that comes bit by bit. A large one is hashed by what most processors have instructions for: 50 MB in 44 ms
    where BLAKE2b takes 120 (one core, OpenSSL 3)."""

    def __init__(self, seed: Any, form: bytes, ref: bytes, method: bytes) -> None:
        seed.update(b"%b%c%b%c%b" % (form, len(method), method, len(ref), ref))
        self._seed, self._body = seed, hashlib.sha256() if form == b"b" else None

    def copy(self) -> "_Signature":
        """As it is now."""
        again = object.__new__(_Signature)
        again._seed, again._body = self._seed.copy(), self._body and self._body.copy()
        return again

    def update(self, data: bytes | memoryview) -> None:
        (self._body or self._seed).update(data)

    def digest(self) -> bytes:
        """Once."""
        if self._body is not None:
            self._seed.update(self._body.digest())
        digest: bytes = self._seed.digest()
        return digest


class Opening:
    """An envelope that comes bit by bit: `update` with each, in order, in any thread; then `verified`."""

    def __init__(self, codec: Codec, kind: Kind, ref: bytes, method: bytes) -> None:
        self._codec, self._kind, self._ref, self._method = codec, kind, ref, method
        self._signature: _Signature | None = None

    def update(self, data: memoryview) -> None:
        """The first time, with HEADER_BYTES at least, or all there is."""
        if self._signature is None:
            if len(self._method) > 255 or len(self._ref) > 255:
                raise self._refusal("names a method or ref longer than 255 bytes")
            version, form, data = bytes(data[:1]), bytes(data[1:2]), data[HEADER_BYTES:]
            if version != b"\x01" or form not in (b"p", b"b", b"j"):
                raise self._refusal("is not an envelope of version 1")
            self._signature = _Signature(self._codec.seed(self._kind), form, self._ref, self._method)
        self._signature.update(data)

    def verified(self, envelope: memoryview) -> "Verified":
        """Of all that came. Raises SignatureError."""
        if self._signature is None or not hmac.compare_digest(self._signature.digest(), envelope[2:HEADER_BYTES]):
            raise self._refusal("does not bear this installation's signature")
        return Verified(bytes(envelope[1:2]), envelope[HEADER_BYTES:])

    def _refusal(self, why: str) -> SignatureError:
        return self._codec.refusal(self._kind, self._ref, why)


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
