"""The requests of one deployment as a server has them, read in one go, in the words of the model."""

import json
from dataclasses import dataclass
from typing import Any

from millstream.broker.held import HeldRequest
from millstream.broker.keys import LANES, DeploymentKeys
from millstream.broker.states import State
from tests.broker.model.model import without_times

Sights = dict[str, dict[str, Any]]
# In one go, because it is read after each command. KEYS 1-4 hashes, 5-7 sorted sets, 8-12 streams, 13 a hash, results,
# then a payload and what was supplied, in turn.
READ_ALL = """
local found = {}
for i = 1, 4 do found[i] = redis.call('HGETALL', KEYS[i]) end
for i = 5, 7 do found[i] = redis.call('ZRANGE', KEYS[i], 0, -1) end
for i = 8, 12 do found[i] = redis.call('XRANGE', KEYS[i], '-', '+') end
for i = 8, 11 do
  local pending = redis.pcall('XPENDING', KEYS[i], 'replicas', '-', '+', 1000)
  found[i + 5] = pending.err and {} or pending -- there is no group
end
found[17] = redis.call('HKEYS', KEYS[13])
local with_more = 14 + ARGV[1]
found[18] = redis.call('MGET', unpack(KEYS, 14, with_more - 1))
for i = with_more, #KEYS, 2 do
  found[#found + 1] = redis.call('PTTL', KEYS[i])
  found[#found + 1] = redis.call('HGETALL', KEYS[i + 1])
end
return found
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """`strays` is what belongs to no open request, or lies in two places: there may be none."""

    places: dict[str, str]
    sights: Sights
    results: dict[str, bytes]
    dead: list[str]  # entry ids
    letters: list[tuple[str, int, int, list[dict[str, Any]]]]
    replicas: set[str]
    payloads: dict[str, bool]  # ref -> is it permanent?
    strays: list[str]


def read(client: Any, keys: DeploymentKeys, refs: list[str], with_more: list[str]) -> Reading:
    """`refs`: all that were ever used; `with_more`: those that ever had large arguments, or waited for values."""
    names = (
        keys.open, keys.held, keys.notes, keys.holds, keys.parked, keys.due, keys.deadlines, *keys.lanes, keys.dead,
        keys.replicas, *(keys.result(ref) for ref in refs),
        *(key for ref in with_more for key in (keys.payload(ref), keys.supplied(ref))),
    )  # fmt: skip
    answers = client.eval(READ_ALL, len(names), *names, len(refs))
    opened, held, notes, holds = map(_pairs, answers[:4])
    parked, due, deadlines = answers[4:7]
    lanes, dead, pending, replicas, results, about = (
        answers[7:11], answers[11], answers[12:16], answers[16], answers[17], answers[18:],
    )  # fmt: skip
    owners = {
        f"{lane} {entry.decode()}": consumer.decode()
        for lane, found in zip(LANES, pending, strict=True)
        for entry, consumer, *_ in found
    }
    entries = {
        f"{lane} {entry.decode()}": _pairs(flat)
        for lane, found in zip(LANES, lanes, strict=True)
        for entry, flat in found
    }
    places = {ref.decode(): place.decode() for ref, place in opened.items()}
    supplied = dict(zip(with_more, map(_pairs, about[1::2]), strict=True))
    stored = {ref: one for ref, one in zip(refs, results, strict=True) if one is not None}
    members = {
        "parked": {one.decode() for one in parked},
        "due": {one.decode() for one in due},
        "held": {one.decode() for one in held},
    }
    sights, strays = {}, []
    for ref, place in places.items():
        wanted = {"parked": {"parked", "held"}, "delayed": {"due", "held"}}.get(place, set())
        if (found := {name for name, there in members.items() if ref in there}) != wanted:
            strays.append(f"{ref} is {place!r} and in {found}")
        if ref in stored:
            strays.append(f"{ref} is {place!r} and has ended")
        if wanted:
            about_it = _held(held[ref.encode()], supplied.get(ref, {}))
        elif place in entries and entries[place][b"ref"].decode() == ref:
            about_it = _entry(entries.pop(place), place, owners.pop(place, ""))
        else:
            strays.append(f"{ref} is {place!r}, where it is not")
            continue
        noted = {name: notes.pop(f"{ref}:{name}".encode(), b"").decode() for name in ("readers", "waiters", "payload")}
        sights[ref] = {
            **about_it,
            "place": place,
            "has_deadline": ref.encode() in deadlines,
            "has_payload": bool(noted["payload"]),
            "readers": noted["readers"].split(),
            "waiters": noted["waiters"].split(),
            "holds": holds.pop(ref.encode(), b"").decode().split()[1:],
        }
    for name, left in (("lanes", entries), ("pending lists", owners), ("notes", notes), ("holds", holds)):
        strays += [f"in the {name}, and not open: {one!r}" for one in left]
    for name, there in (*members.items(), ("deadlines", {one.decode() for one in deadlines})):
        strays += [f"in {name!r}, and not open: {one}" for one in there - places.keys()]
    strays += [
        f"supplied, and not held: {ref}" for ref, values in supplied.items() if values and ref not in members["held"]
    ]
    return Reading(
        places, sights, stored, [entry.decode() for entry, _ in dead], [_letter(_pairs(flat)) for _, flat in dead],
        {name.decode() for name in replicas},
        {ref: ttl_ms == -1 for ref, ttl_ms in zip(with_more, about[::2], strict=True) if ttl_ms != -2},
        strays,
    )  # fmt: skip


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _entry(fields: dict[bytes, bytes], place: str, owner: str) -> dict[str, Any]:
    return {
        **_common({name.decode(): value for name, value in fields.items()}),
        "state": State.RUNNING if owner else State.QUEUED,
        "lane": place.split()[0],
        "replica": owner,
        "client": fields[b"reply"].decode(),
        "origin": fields.get(b"lane", b"").decode(),
        "missing": set(),
    }


def _held(packed: bytes, supplied: dict[bytes, bytes]) -> dict[str, Any]:
    one = HeldRequest.read(packed)
    noted = {name.decode(): value for name, value in supplied.items() if name != b"missing"}
    about = _common(one.fields | {name: value for name, value in noted.items() if value})
    missing = {name.removeprefix("dep:") for name, value in noted.items() if not value}
    if one.waits not in ("-", "*") and not noted:
        missing = {one.waits}
    if supplied.get(b"missing") is not None:
        assert int(supplied[b"missing"]) == len(missing)
    state = State.PARKED if missing else State.DELAYED
    return {
        **about,
        "state": state,
        "lane": one.lane,
        "replica": "",
        "client": one.client,
        "origin": "",
        "missing": missing,
    }


def _common(fields: dict[str, bytes]) -> dict[str, Any]:
    return {
        "attempt": int(fields.get("attempt", b"1")),
        "retries": int(fields.get("retries", b"0")),
        "history": without_times(json.loads(fields.get("history", b"[]"))),
        "max_attempts": int(fields["max_attempts"]) if "max_attempts" in fields else None,
        "values": {name.removeprefix("dep:"): value for name, value in fields.items() if name.startswith("dep:")},
    }


def _letter(fields: dict[bytes, bytes]) -> tuple[str, int, int, list[dict[str, Any]]]:
    about = _common({name.decode(): value for name, value in fields.items()})
    return fields[b"ref"].decode(), about["attempt"], about["retries"], about["history"]
