"""Whatever is done to an envelope: it is refused, and nothing of it is unpickled or parsed."""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker import pickling
from millstream.broker.codec import Codec, Kind, codec_for
from millstream.broker.pickling import Pickled
from millstream.errors import SignatureError
from tests.security.hostile import GARBAGE, OVERSIZED_BYTES, REF, Canary, damaged, fuzzed, nothing_is_loaded

CODEC = codec_for(b"a secret for tests", "ms", "app.Model")
METHOD = b"__call__"
SMALL = CODEC.seal("request", REF, pickling.dump(((1, 2), {}), "a call"), METHOD)
AS_JSON = CODEC.seal_json("request", REF, [[1, 2], {}], METHOD)
SEALING = CODEC.sealing("request", REF, Pickled(pickling.dump(1, "a value"), [memoryview(b"abc")]), METHOD)
IN_PARTS = b"".join([SEALING.sign(), *SEALING.parts])
KINDS = get_args(Kind)


def refuses(codec: Codec, kind: Kind, ref: bytes, envelope: bytes, method: bytes) -> bool:
    for attempt in (codec.open, codec.verify, codec.verified):
        with pytest.raises(SignatureError):
            attempt(kind, ref, envelope, method)
    return True


@pytest.mark.parametrize("genuine", [SMALL, AS_JSON, IN_PARTS], ids=["pickle", "json", "parts"])
def test_damaged_envelope_is_refused_unread(genuine: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    @fuzzed(300)
    @given(st.one_of(damaged(genuine), GARBAGE))
    def try_one(envelope: bytes) -> None:
        if envelope != genuine:
            assert refuses(CODEC, "request", REF, envelope, METHOD)

    CODEC.open("request", REF, genuine, METHOD)
    with nothing_is_loaded(monkeypatch) as loaded:
        monkeypatch.setattr(json, "loads", lambda text: pytest.fail(f"{text!r} was parsed"))
        try_one()

    assert loaded == []


@fuzzed(300)
@given(
    namespace=st.sampled_from(["ms", "other", "m", "ms\0app"]),
    tag=st.sampled_from(["app.Model", "app.Other", "app.Mode", "Model"]),
    kind=st.sampled_from(KINDS),
    ref=st.sampled_from([REF, b"s" * 22, REF[:-1], b""]),
    method=st.sampled_from([METHOD, b"other", b"", METHOD + REF]),
    key=st.sampled_from([b"a secret for tests", b"another", b"a secret for test"]),
)
def test_genuine_envelope_is_good_in_its_own_place_only(
    namespace: str, tag: str, kind: Kind, ref: bytes, method: bytes, key: bytes
) -> None:
    codec = codec_for(key, namespace, tag)
    is_its_place = (codec, kind, ref, method) == (CODEC, "request", REF, METHOD)

    for envelope in (SMALL, AS_JSON, IN_PARTS):
        assert is_its_place or refuses(codec, kind, ref, envelope, method)


def test_bomb_does_not_go_off(canary: Canary) -> None:
    for envelope in canary.envelopes("ms", "app.Model", REF, METHOD):
        for kind in KINDS:
            assert refuses(CODEC, kind, REF, envelope, METHOD)


def test_bomb_would_go_off_if_it_were_unpickled(tmp_path: object, canary: Canary) -> None:
    pickling.load(canary.bomb)

    assert not canary.is_alive
    canary.path.rmdir()


def test_oversized_names_and_bodies_are_refused() -> None:
    assert refuses(CODEC, "request", b"r" * 256, SMALL, METHOD)
    assert refuses(CODEC, "request", REF, SMALL, b"m" * 256)
    assert refuses(CODEC, "request", REF, SMALL + bytes(OVERSIZED_BYTES), METHOD)
