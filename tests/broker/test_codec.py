"""Envelopes: what was signed opens, and nothing else does."""

import os
import pickle
from dataclasses import dataclass

import pytest

from millstream.broker import pickling
from millstream.broker.codec import HEADER_BYTES, Codec, Kind, Sealing, codec_for
from millstream.broker.pickling import Pickled
from millstream.config import PUBLIC_KEY
from millstream.errors import SignatureError

SECRET = b"a secret"
REF = b"r" * 22
METHOD = b"embed"
KINDS: tuple[Kind, ...] = ("request", "value", "error", "definition", "check", "item")


@pytest.fixture
def codec() -> Codec:
    return Codec(SECRET, "ms", "app.Model")


def sealed(codec: Codec, value: object = "value") -> bytes:
    return codec.seal("request", REF, pickling.dump(value, what="value"), METHOD)


@dataclass
class Block:
    """What a library with large arrays does: its bytes lie beside the pickle, if they are many."""

    data: bytes | bytearray

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return Block, (pickle.PickleBuffer(self.data),)


BLOCK = Block(b"0123456789" * 10_000)


@dataclass
class Trap:
    """Makes a folder when it is unpickled."""

    path: str

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("value", [None, 7, "text", b"\x00\xff", {"a": [1, 2, (3,)]}])
@pytest.mark.parametrize("kind", KINDS)
def test_pickled_value_comes_back(codec: Codec, kind: Kind, value: object) -> None:
    body = pickling.dump(value, what="value")

    assert codec.open(kind, REF, codec.seal(kind, REF, body)) == value


@pytest.mark.parametrize("value", [None, 7, "täxt", [1, {"a": 2.5}]])
def test_json_value_comes_back(codec: Codec, value: object) -> None:
    envelope = codec.seal_json("request", REF, value, METHOD)

    assert envelope[:2] == b"\x01j"
    assert codec.open("request", REF, envelope, METHOD) == value


def test_processes_with_the_same_secret_understand_each_other(codec: Codec) -> None:
    other = Codec(SECRET, "ms", "app.Model")

    assert sealed(codec) == sealed(other)
    assert other.open("request", REF, sealed(codec), METHOD) == "value"


@pytest.mark.parametrize("form", ["pickle", "json"])
def test_no_byte_can_be_changed(codec: Codec, form: str) -> None:
    envelope = sealed(codec) if form == "pickle" else codec.seal_json("request", REF, "value", METHOD)

    for position in range(len(envelope)):
        for flip in (0x01, 0x80):
            damaged = bytearray(envelope)
            damaged[position] ^= flip
            with pytest.raises(SignatureError):
                codec.open("request", REF, bytes(damaged), METHOD)


def test_nothing_can_be_cut_off_or_added(codec: Codec) -> None:
    envelope = sealed(codec)

    for damaged in (*(envelope[:end] for end in range(len(envelope))), envelope + b"\x00", b"\x01" + envelope):
        with pytest.raises(SignatureError):
            codec.open("request", REF, damaged, METHOD)


def test_form_cannot_be_exchanged(codec: Codec) -> None:
    envelope = sealed(codec)

    with pytest.raises(SignatureError):
        codec.open("request", REF, b"\x01j" + envelope[2:], METHOD)


@pytest.mark.parametrize("other", [b"R" * 22, b"r" * 21, b"r" * 23, b""])
def test_body_cannot_be_moved_to_another_ref(codec: Codec, other: bytes) -> None:
    with pytest.raises(SignatureError):
        codec.open("request", other, sealed(codec), METHOD)


@pytest.mark.parametrize("other", [b"", b"embe", b"embed2", b"delete"])
def test_body_cannot_be_moved_to_another_method(codec: Codec, other: bytes) -> None:
    with pytest.raises(SignatureError):
        codec.open("request", REF, sealed(codec), other)


@pytest.mark.parametrize("other", [kind for kind in KINDS if kind != "request"])
def test_body_cannot_be_moved_to_another_kind(codec: Codec, other: Kind) -> None:
    with pytest.raises(SignatureError):
        codec.open(other, REF, sealed(codec), METHOD)


@pytest.mark.parametrize(
    ("secret", "namespace", "tag"),
    [
        (b"another", "ms", "app.Model"),
        (PUBLIC_KEY, "ms", "app.Model"),
        (SECRET, "ms2", "app.Model"),
        (SECRET, "ms", "app.Model2"),
        (SECRET, "m", "sapp.Model"),
    ],
)
def test_body_cannot_be_moved_to_another_installation_or_deployment(
    codec: Codec, secret: bytes, namespace: str, tag: str
) -> None:
    with pytest.raises(SignatureError):
        Codec(secret, namespace, tag).open("request", REF, sealed(codec), METHOD)


def test_method_and_ref_cannot_be_shifted_into_each_other(codec: Codec) -> None:
    envelope = codec.seal("request", b"cdef", b"body", b"ab")

    with pytest.raises(SignatureError):
        codec.open("request", b"def", envelope, b"abc")


def test_nothing_is_unpickled_before_it_was_verified(codec: Codec, tmp_path: os.PathLike[str]) -> None:
    folder = os.path.join(tmp_path, "made by unpickling")
    forged = Codec(b"the secret of somebody else", "ms", "app.Model").seal(
        "value", REF, pickling.dump(Trap(folder), what="value")
    )

    with pytest.raises(SignatureError):
        codec.open("value", REF, forged)

    assert not os.path.exists(folder)


def test_refusal_names_the_ref_and_the_way_out(codec: Codec) -> None:
    with pytest.raises(SignatureError, match=r"app\.Model~rrrr.*MILLSTREAM_SECRET_KEY") as caught:
        codec.open("value", REF, b"\x01p" + b"x" * 30)

    assert caught.value.__dict__["ref_id"] == "app.Model~" + REF.decode()


def test_verify_hands_out_form_and_body_without_decoding(codec: Codec) -> None:
    envelope = codec.seal("value", REF, b"not a pickle")

    assert codec.verify("value", REF, envelope) == (b"p", b"not a pickle")
    assert len(envelope) == HEADER_BYTES + len(b"not a pickle")


def test_a_body_cannot_be_cut_anew_between_method_ref_and_body(codec: Codec) -> None:
    """What is signed is a string of parts: no other cut of the same bytes may verify."""
    inner = b"p" + bytes([1]) + b"m" + bytes([len(REF)]) + REF + b"a foreign pickle"
    envelope = codec.seal("request", REF, b"args" + inner, b"m")

    moved = envelope[:HEADER_BYTES] + b"a foreign pickle"
    method = b"m" + bytes([len(REF)]) + REF + b"args" + inner[:2]

    with pytest.raises(SignatureError):
        codec.open("request", REF, moved, method)
    with pytest.raises(SignatureError, match="longer than 255"):
        codec.open("request", REF, moved, b"m" * 256)


def test_signature_is_the_one_in_the_documentation(codec: Codec) -> None:
    """A test vector for callers in other languages: keyed BLAKE2b over namespace 0 tag 0 form length method length ref body."""
    envelope = codec.seal_json("request", b"0123456789abcdefghijkl", [[1, "two"], {}], b"embed")

    assert envelope.hex() == "016a162bae040b771b8b0b430b74d96b47045b5b312c202274776f225d2c207b7d5d"


# large bodies


def in_parts(value: object) -> Pickled:
    pickled = pickling.dump_parts(value, what="value")
    assert isinstance(pickled, Pickled)
    return pickled


def join(sealing: Sealing) -> bytes:
    return b"".join([sealing.sign(), *sealing.parts])


def test_large_value_without_buffers_has_the_same_form(codec: Codec) -> None:
    pickled = in_parts("x" * 100_000)

    envelope = join(codec.sealing("value", REF, pickled))

    assert envelope[HEADER_BYTES:] == bytes(4) + pickled.data
    assert codec.open("value", REF, envelope) == "x" * 100_000


def test_large_value_with_buffers_comes_back(codec: Codec) -> None:
    value = {"a": BLOCK, "b": Block(b"x" * 70_000), "small": Block(b"few"), "text": "x"}
    pickled = in_parts(value)

    again = codec.open("request", REF, join(codec.sealing("request", REF, pickled, METHOD)), METHOD)

    assert again == value
    assert [len(buffer) for buffer in pickled.buffers] == [100_000, 70_000]


def test_form_with_buffers_is_the_one_in_the_documentation(codec: Codec) -> None:
    """A test vector: number of buffers, their lengths, the pickle, the buffers. Nobody else makes so small ones."""
    pickled = Pickled(pickle.dumps(5, 5), [memoryview(b"abc"), memoryview(b"")])

    envelope = join(codec.sealing("value", b"0123456789abcdefghijkl", pickled))

    assert envelope[HEADER_BYTES:].hex() == "02000000" + "0300000000000000" + "00" * 8 + "80054b052e" + b"abc".hex()
    assert envelope[:HEADER_BYTES].hex() == "016266217f475eead48b49d75125e834cc36"
    assert codec.open("value", b"0123456789abcdefghijkl", envelope) == 5


def test_no_byte_of_a_form_with_buffers_can_be_changed(codec: Codec) -> None:
    pickled = Pickled(pickle.dumps(5, 5), [memoryview(b"abc"), memoryview(b"de")])
    envelope = join(codec.sealing("value", REF, pickled))

    for position in range(len(envelope)):
        for flip in (0x01, 0x80):
            damaged = bytearray(envelope)
            damaged[position] ^= flip
            with pytest.raises(SignatureError):
                codec.open("value", REF, bytes(damaged))


@pytest.mark.parametrize("form", [b"p", b"j"])
def test_form_with_buffers_cannot_be_taken_for_another(codec: Codec, form: bytes) -> None:
    envelope = join(codec.sealing("value", REF, in_parts(BLOCK)))

    with pytest.raises(SignatureError):
        codec.open("value", REF, b"\x01" + form + envelope[2:])


def test_large_body_is_refused_before_it_is_looked_at(codec: Codec, tmp_path: os.PathLike[str]) -> None:
    folder = os.path.join(tmp_path, "made by unpickling")
    forger = Codec(b"the secret of somebody else", "ms", "app.Model")
    trap = in_parts([Trap(folder), BLOCK])

    for envelope in (join(forger.sealing("value", REF, trap)), forger.seal("value", REF, trap.data + b"x" * 70_000)):
        with pytest.raises(SignatureError):
            codec.open("value", REF, envelope)

    assert not os.path.exists(folder)


def test_large_json_comes_back(codec: Codec) -> None:
    value = ["x" * 100_000]

    assert codec.open("value", REF, codec.seal_json("value", REF, value)) == value


def test_verify_hands_out_the_body_of_a_large_form(codec: Codec) -> None:
    pickled = in_parts(BLOCK)
    form, body = codec.verify("value", REF, join(codec.sealing("value", REF, pickled)))

    assert (form, type(body)) == (b"b", bytes)
    assert body.endswith(bytes(pickled.buffers[0]))


def test_item_cannot_be_moved_to_another_place_in_its_stream(codec: Codec) -> None:
    envelope = codec.seal("item", REF, pickling.dump("value", what="item"), b"7")

    assert codec.open("item", REF, envelope, b"7") == "value"
    for number in (b"", b"6", b"77", b"07"):
        with pytest.raises(SignatureError):
            codec.open("item", REF, envelope, number)


def test_codec_of_a_deployment_is_made_once() -> None:
    assert codec_for(SECRET, "ms", "app.Model") is codec_for(SECRET, "ms", "app.Model")
    assert codec_for(SECRET, "ms", "app.Model") is not codec_for(SECRET, "ms", "app.Other")


# made ready for many


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [b"", METHOD, b"m" * 255])
def test_sealer_and_opener_do_what_seal_and_open_do(codec: Codec, kind: Kind, method: bytes) -> None:
    body = pickling.dump("value", what="value")
    envelope = codec.seal(kind, REF, body, method)

    assert codec.sealer(kind, method)(REF, body) == envelope
    assert codec.opener(kind, method)(REF, envelope) == "value"
    assert codec.opener(kind, method)(b"short", codec.seal(kind, b"short", body, method)) == "value"
    assert codec.opener(kind, method)(REF, codec.seal_json(kind, REF, ["value"], method)) == ["value"]


def test_opener_opens_nothing_that_open_would_not(codec: Codec) -> None:
    open_, envelope = codec.opener("request", METHOD), sealed(codec)

    for i in range(len(envelope)):
        with pytest.raises(SignatureError):
            open_(REF, envelope[:i] + bytes([envelope[i] ^ 1]) + envelope[i + 1 :])
    for ref, kind, method in ((b"q" * 22, "request", METHOD), (REF, "value", METHOD), (REF, "request", b"other")):
        with pytest.raises(SignatureError):
            codec.opener(kind, method)(ref, envelope)  # type: ignore[arg-type]
    with pytest.raises(SignatureError):
        codec.opener("request", b"m" * 256)(REF, envelope)
