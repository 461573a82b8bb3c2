"""The broker against a model of it, on real servers: whatever clients, replicas, sweepers and operators do, in whatever
order, however far each of them gets.

Who does several things one after the other (`parts`) is stopped before each command: others come in between, a reply is
lost and the command sent again, or the rest is never done. In the end, what living replicas and sweepers do must bring
every request that was ever accepted to one end.
"""

import json
import logging
import os
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from millstream.broker import scripts
from millstream.broker.call import Call
from millstream.broker.keys import GROUP, LANES, DeploymentKeys
from millstream.broker.states import TERMINAL, State
from tests.broker.model import parts
from tests.broker.model.model import HELD
from tests.broker.model.parts import Attempt
from tests.broker.model.stepping import Actor, Step, drive
from tests.broker.model.world import World
from tests.helpers import CALLER, Claimed, attempts_of, request
from tests.leaks import find_leaks, find_lost, take_snapshot
from tests.servers import AnyServer

EXAMPLES = os.environ.get("MILLSTREAM_MODEL_EXAMPLES")  # with it: so many, other ones each time, and longer ones
COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
QUICK = settings(max_examples=40, stateful_step_count=30, derandomize=True, **COMMON)
LONG = settings(max_examples=int(EXAMPLES or 1), stateful_step_count=50, **COMMON)

Pair = tuple[str, str]  # tag, ref
A, B = TAGS = ("app.A", "app.B")
REPLICAS = ("r-1", "r-2", "r-3")
SAVIOUR = "r-9"  # lives when all is over
LATER_MS = 3_600_000
ROUNDS = 50  # of settling

tags = st.sampled_from(TAGS)
replicas = st.sampled_from(REPLICAS)
asked = st.sampled_from([{}, {}, {"attempts": 1}, {"attempts": 2}, {"timeout_ms": LATER_MS}, {"stream": 4}])
configs = st.fixed_dictionaries(
    {
        "max_attempts": st.sampled_from([3, 1, 2]),
        "max_queued": st.sampled_from(["", "3"]),
        "timeout_ms": st.sampled_from(["", str(LATER_MS)]),
    }
)
once_or_twice = st.sampled_from([1, 1, 2])  # twice: the first answer was lost
picks = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5]), min_size=1, max_size=3)
# So many commands are carried out at first; the rest when, and if, it is its turn again.
paces = st.sampled_from([99, 99, 0, 1, 2, 3, 4])


def has(*states: State) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Only while some request is in one of these states: else nothing would happen most of the time."""

    def is_there(self: "Broker") -> bool:
        return any(one.state in states for model in self.world.models.values() for one in model.open.values())

    return precondition(is_there)


class Broker(RuleBasedStateMachine):
    """What can happen. Refs, attempts and parts under way are kept: also old ones are used again."""

    client: Any
    refs: "Bundle[Pair]" = Bundle("refs")

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.world = World(self.client, TAGS)
        self._count = 0
        self._attempts: list[Attempt] = []
        self._under_way: list[Actor] = []

    @initialize(
        target=refs, config_a=configs, config_b=configs, living=st.lists(replicas, unique=True), count=st.integers(0, 3)
    )
    def begin(self, config_a: dict[str, Any], config_b: dict[str, Any], living: list[str], count: int) -> Any:
        """Two deployments with some replicas, some requests, and refs of which the server has not heard yet."""
        for tag, config in ((A, config_a), (B, config_b)):
            self._through(parts.deploy(self._keys(tag), config))
            for replica in living:
                self._through(parts.appear(self._keys(tag), replica))
        never_sent, sent = [self._new_ref(A), self._new_ref(B)], [self._new_ref(A) for _ in range(count)]
        if sent:
            self._run(1, scripts.submit(self._keys(A), CALLER, [part for _, ref in sent for part in request(ref)]))
        return multiple(*never_sent, *sent)

    # callers

    @rule(
        target=refs, tag=tags, lane=st.sampled_from(LANES[1:]), count=st.integers(1, 3), extras=asked,
        again=st.lists(refs, max_size=2), times=once_or_twice,
    )  # fmt: skip
    def submit(self, tag: str, lane: str, count: int, extras: dict[str, Any], again: list[Pair], times: int) -> Any:
        new = [self._new_ref(tag) for _ in range(count)]
        refs = [ref for of, ref in new + again if of == tag]
        text = json.dumps(extras) if extras else ""
        batch = [part for ref in refs for part in request(ref, lane=lane, extras=text)]
        self._run(times, scripts.submit(self._keys(tag), CALLER, batch))
        return multiple(*new)

    @rule(target=refs, tag=tags)
    def make_ref(self, tag: str) -> Any:
        return self._new_ref(tag)

    @rule(target=refs, tag=tags, needs=st.lists(refs, max_size=3), is_later=st.booleans(), extras=asked, pace=paces)
    def send_dependant(self, tag: str, needs: list[Pair], is_later: bool, extras: dict[str, Any], pace: int) -> Any:
        """A request that waits for others, or for its time."""
        pair = self._new_ref(tag)
        self._hold(pair, needs, is_later, extras, pace)
        return pair

    @rule(target=refs, replica=replicas, of=st.lists(tags, min_size=2, max_size=4))
    def send_chain(self, replica: str, of: list[str]) -> Any:
        """Each needs the one before it, and the first one runs."""
        pairs = [self._new_ref(tag) for tag in of]
        self._run(1, scripts.submit(self._keys(of[0]), CALLER, request(pairs[0][1])))
        for before, pair in pairwise(pairs):
            self._hold(pair, [before], False, {}, 99)
        self._attempts += self._claim(of[0], replica, 4)
        return multiple(*pairs)

    @rule(pair=refs, needs=st.lists(refs, max_size=2), is_later=st.booleans(), extras=asked, pace=paces)
    def send_dependant_again(
        self, pair: Pair, needs: list[Pair], is_later: bool, extras: dict[str, Any], pace: int
    ) -> None:
        """Each needs only what has an earlier ref: so nobody waits for himself."""
        self._hold(pair, [one for one in needs if one[1] < pair[1]], is_later, extras, pace)

    @rule(pair=refs, pace=paces)
    def send_large(self, pair: Pair, pace: int) -> None:
        self._begin(parts.send_large(self._keys(pair[0]), pair[1]), pace)

    @has(*set(State) - TERMINAL)
    @rule(pair=refs, times=once_or_twice)
    def listen(self, pair: Pair, times: int) -> None:
        self._run(times, scripts.watch(self._keys(pair[0]), "readers", "reader", [pair[1]]))

    @rule(pair=refs, others=st.lists(refs, max_size=2), is_on_its_way=st.booleans(), pace=paces)
    def cancel(self, pair: Pair, others: list[Pair], is_on_its_way: bool, pace: int) -> None:
        refs = sorted({ref for tag, ref in [pair, *others] if tag == pair[0]})
        self._begin(parts.cancel(self._keys(pair[0]), refs, is_on_its_way=is_on_its_way), pace)

    @has(*set(State) - TERMINAL)
    @rule(pair=refs, is_overdue=st.booleans(), pace=paces)
    def expire(self, pair: Pair, is_overdue: bool, pace: int) -> None:
        if is_overdue:
            self.world.let_deadline_pass(*pair)
        self._begin(parts.expire(self._keys(pair[0]), [pair[1]]), pace)

    @precondition(lambda self: any(model.streams for model in self.world.models.values()))
    @rule(pair=refs, count=st.integers(0, 4), times=once_or_twice)
    def read_items(self, pair: Pair, count: int, times: int) -> None:
        stream = self.world.models[pair[0]].streams.get(pair[1])
        count = min(count, stream.count if stream is not None else 0)  # what is not there cannot be read
        self._run(times, scripts.consume(self._keys(pair[0]), pair[1], count))

    # replicas

    @rule(tag=tags, replica=replicas, free=st.integers(1, 4), is_lost=st.sampled_from([False, False, True]))
    def claim(self, tag: str, replica: str, free: int, is_lost: bool) -> None:
        taken = self._claim(tag, replica, free)
        self._attempts += [] if is_lost else taken

    @rule(tag=tags, replica=replicas, extras=asked)
    def submit_and_claim(self, tag: str, replica: str, extras: dict[str, Any]) -> None:
        """The usual way to an attempt: else few get so far."""
        text = json.dumps(extras) if extras else ""
        self._run(1, scripts.submit(self._keys(tag), CALLER, request(self._new_ref(tag)[1], extras=text)))
        self._attempts += self._claim(tag, replica, 2)

    @has(State.RUNNING)
    @rule(tag=tags, replica=replicas)
    def hear_of_lost_claims(self, tag: str, replica: str) -> None:
        keys = self._keys(tag)
        for lane in LANES if self.world.models[tag].has_groups else ():
            for row in self.client.xpending_range(keys.lane(lane), GROUP, "-", "+", 100, replica):
                ((entry, fields),) = self.client.xrange(keys.lane(lane), row["message_id"], row["message_id"])
                self._attempts.append(Attempt(tag, replica, Claimed(fields[b"ref"].decode(), lane, entry, fields)))

    @precondition(lambda self: bool(self._attempts))
    @rule(picks=picks, succeeds=st.booleans(), is_large=st.booleans(), pace=paces)
    def finish(self, picks: list[int], succeeds: bool, is_large: bool, pace: int) -> None:
        tag, _, batch = self._some_of_one_lane(picks)
        self._begin(parts.finish(self._keys(tag), batch, succeeds=succeeds, is_large=is_large), pace)

    @precondition(lambda self: bool(self._attempts))
    @rule(picks=picks, is_later=st.booleans(), times=once_or_twice)
    def retry(self, picks: list[int], is_later: bool, times: int) -> None:
        tag, replica, batch = self._some_of_one_lane(picks)
        failure = json.dumps({"replica": replica, "cause": "raised ValueError: no"})
        failures = [part for one in batch for part in (one.entry, one.ref, LATER_MS if is_later else 0, failure)]
        self._run(times, scripts.retry(self._keys(tag), batch[0].lane, failures))

    @precondition(lambda self: bool(self._attempts))
    @rule(picks=picks, times=once_or_twice)
    def hand_back(self, picks: list[int], times: int) -> None:
        tag, _, batch = self._some_of_one_lane(picks)
        lane = batch[0].lane
        self._run(times, scripts.hand_back(self._keys(tag), lane, lane, [one.entry for one in batch]))

    @precondition(lambda self: bool(self._attempts))
    @rule(picks=picks, first=st.integers(0, 3), count=st.integers(0, 3), times=once_or_twice)
    def emit(self, picks: list[int], first: int, count: int, times: int) -> None:
        tag, _, (one, *_) = self._some_of_one_lane(picks)
        stream = self.world.models[tag].streams.get(one.ref)
        first = min(first, stream.count if stream is not None else 0)  # in order
        items, place = [b"item"] * count, f"{one.lane} {one.entry.decode()}"
        self._run(times, scripts.emit(self._keys(tag), one.ref, place, b"", parts.TTL_S, first, items))

    @precondition(lambda self: bool(self._attempts))
    @rule(pick=st.sampled_from([0, 0, 0, 1, 2, 3]), pace=paces, is_late=st.booleans())
    def kill(self, pick: int, pace: int, is_late: bool) -> None:
        """The replica that claimed this; its launcher sees that. `is_late`: what it sent last arrives after that."""
        attempt = self._attempts[-1 - pick % len(self._attempts)]
        keys = self._keys(attempt.tag)
        self._begin(parts.bury(keys, attempt.replica), pace)
        if is_late:
            self._through(parts.finish(keys, [attempt.one], succeeds=True, is_large=False))

    @rule(tag=tags, replica=replicas, is_alive=st.booleans())
    def renew_or_lose_lease(self, tag: str, replica: str, is_alive: bool) -> None:
        if is_alive:
            self._through(parts.appear(self._keys(tag), replica))
        else:
            self.world.perform(Step(command=("DEL", self._keys(tag).lease(replica))))

    # sweepers and time

    @rule(tag=tags, pace=paces)
    def sweep(self, tag: str, pace: int) -> None:
        self._begin(parts.sweep(self._keys(tag)), pace)

    @has(State.DELAYED)
    @rule(tag=tags)
    def wake(self, tag: str) -> None:
        self._run(1, scripts.wake(self._keys(tag)))

    @has(*HELD)
    @rule(pair=refs)
    def let_time_come(self, pair: Pair) -> None:
        self.world.let_time_come(*pair)

    @precondition(lambda self: self._may_expire())
    @rule(pick=st.integers(0, 20))
    def let_something_expire(self, pick: int) -> None:
        """A result, large arguments that no submit has seen or a dead letter has, or a large value."""
        there = self._may_expire()
        self.world.expire(there[pick % len(there)])

    # operators

    @precondition(lambda self: any(model.dead for model in self.world.models.values()))
    @rule(tag=tags, picks=st.lists(st.integers(0, 9), min_size=1, max_size=2), times=once_or_twice)
    def requeue(self, tag: str, picks: list[int], times: int) -> None:
        self._run(times, scripts.requeue(self._keys(tag), self._dead(tag, picks)))

    @precondition(lambda self: any(model.dead for model in self.world.models.values()))
    @rule(tag=tags, picks=st.lists(st.integers(0, 9), min_size=1, max_size=2), times=once_or_twice)
    def drop(self, tag: str, picks: list[int], times: int) -> None:
        self._run(times, scripts.drop(self._keys(tag), self._dead(tag, picks)))

    @rule(tag=tags, config=st.none() | configs, pace=paces)
    def deploy_or_remove(self, tag: str, config: dict[str, Any] | None, pace: int) -> None:
        keys = self._keys(tag)
        self._begin(parts.remove(keys) if config is None else parts.deploy(keys, config), pace)

    # those who are half-way through something

    @precondition(lambda self: bool(self._under_way))
    @rule(
        pick=st.integers(0, 9),
        count=st.sampled_from([1, 1, 2, 99]),
        reply_is_lost=st.sampled_from([False, False, True]),
    )
    def go_on(self, pick: int, count: int, reply_is_lost: bool) -> None:
        actor = self._under_way[pick % len(self._under_way)]
        for _ in range(count):
            if not actor.is_through:
                actor.step(self.world.perform, reply_is_lost=reply_is_lost)
                reply_is_lost = False
        self._under_way = [actor for actor in self._under_way if not actor.is_through]

    # the end

    def teardown(self) -> None:
        if not self.world.is_broken:
            self._settle()
            self._check_the_end()

    def _settle(self) -> None:
        """Whoever was half-way through something is gone; all replicas but one, too. Nobody calls any more."""
        for tag in TAGS:
            keys, model = self._keys(tag), self.world.models[tag]
            for replica in sorted(model.leases):
                self.world.perform(Step(command=("DEL", keys.lease(replica))))
            if model.max_attempts is None:
                self._through(parts.remove(keys))
        for _ in range(ROUNDS):
            for tag in TAGS:
                self._settle_a_little(tag)
            if not any(self.world.models[tag].open for tag in TAGS):
                return
        raise AssertionError(f"never ended: {[one for tag in TAGS for one in self.world.models[tag].open.values()]}")

    def _settle_a_little(self, tag: str) -> None:
        keys, model = self._keys(tag), self.world.models[tag]
        if model.max_attempts is None:
            return
        self._through(parts.appear(keys, SAVIOUR))
        for ref in list(model.open):
            self.world.let_time_come(tag, ref)
        self._through(parts.sweep(keys))
        for attempt in self._claim(tag, SAVIOUR, 100):
            self._through(parts.finish(keys, [attempt.one], succeeds=True, is_large=False))

    def _check_the_end(self) -> None:
        for tag in TAGS:
            assert set(self.world.models[tag].results) == self.world.accepted[tag], (
                "not all that was accepted has ended"
            )
        snapshot = take_snapshot(self.client)
        assert find_lost(snapshot) == []
        assert find_leaks(snapshot) == []

    # in short

    def _hold(self, pair: Pair, needs: list[Pair], is_later: bool, extras: dict[str, Any], pace: int) -> None:
        ref_ids = [f"{tag}~{ref}" for tag, ref in needs]
        delay_ms = LATER_MS if is_later else 0
        self._begin(parts.send_dependant(self._keys(pair[0]), pair[1], "normal", extras, delay_ms, ref_ids), pace)

    def _may_expire(self) -> list[str]:
        """Keys with a TTL."""
        found: list[str] = []
        for model in self.world.models.values():
            found += map(model.keys.result, model.results)
            found += [model.keys.payload(ref) for ref, is_permanent in model.payloads.items() if not is_permanent]
            found += model.large_values
        return sorted(found)

    def _keys(self, tag: str) -> DeploymentKeys:
        return self.world.models[tag].keys

    def _new_ref(self, tag: str) -> Pair:
        self._count += 1
        ref = f"{self._count:022d}"
        self.world.refs[tag].append(ref)
        return tag, ref

    def _run(self, times: int, call: Call[Any]) -> None:
        for _ in range(times):
            self.world.perform(Step(call))

    def _through(self, work: Coroutine[Step, Any, Any]) -> None:
        drive(work, self.world.perform)

    def _begin(self, work: Coroutine[Step, Any, Any], pace: int) -> None:
        """Carry out so many commands. Who is not through then may go on later."""
        actor = Actor(work)
        for _ in range(pace):
            if not actor.is_through:
                actor.step(self.world.perform)
        if not actor.is_through:
            self._under_way.append(actor)

    def _claim(self, tag: str, replica: str, free: int) -> list[Attempt]:
        if not self.world.models[tag].has_groups:
            return []
        _, taken = self.world.perform(Step(scripts.claim(self._keys(tag), replica, free)))
        return [Attempt(tag, replica, one) for one in attempts_of(self._keys(tag), taken)]

    def _some_of_one_lane(self, picks: list[int]) -> tuple[str, str, list[Claimed]]:
        """Deployment, replica, and some of what that took from one lane; 0 picks what was claimed last."""
        picked = [self._attempts[-1 - pick % len(self._attempts)] for pick in picks]
        tag, replica, first = picked[0]
        alike = [one for of, by, one in picked if (of, by, one.lane) == (tag, replica, first.lane)]
        return tag, replica, list({one.ref: one for one in reversed(alike)}.values())

    def _dead(self, tag: str, picks: list[int]) -> list[str]:
        """Entry ids of dead letters; of one that never was, if there are none."""
        entries = [entry for entry, _ in self.world.models[tag].dead] or ["1-1"]
        return [entries[pick % len(entries)] for pick in picks]


def test_broker_does_what_the_model_does_and_brings_every_request_to_one_end(
    server: AnyServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "millstream.sweeper")
    with server.connect_blocking() as client:
        machine = type("Broker", (Broker,), {"client": client})
        run_state_machine_as_test(machine, settings=LONG if EXAMPLES else QUICK)
        client.flushall()
