"""A server and the model of it, side by side: each command goes to both, and they must agree on its answer and on all
that there is afterwards.

Beside that, what must hold whatever the model says: no step outside the table of transitions, and no attempt more than
there are causes for.
"""

from typing import Any

from redis.exceptions import ResponseError

from millstream.broker.held import HeldRequest
from millstream.broker.keys import DeploymentKeys
from millstream.broker.states import TERMINAL, TRANSITIONS, State
from tests.broker.model import reading
from tests.broker.model.model import HELD, Deployment, Refusal, in_groups, tag_of
from tests.broker.model.stepping import Step, send
from tests.helpers import attempts_of

MOVES = {(before, after) for (before, _), after in TRANSITIONS.items()}
LOOKS = ("EXISTS", "HGET", "HKEYS", "CLIENT", "XREADGROUP")  # plain commands that change nothing


class World:
    """`refs` are all that were ever made, per deployment."""

    def __init__(self, client: Any, tags: tuple[str, ...]) -> None:
        self.client = client
        self.models = {tag: Deployment(DeploymentKeys("ms", tag)) for tag in tags}
        self.refs: dict[str, list[str]] = {tag: ["0" * 22] for tag in tags}
        self.accepted: dict[str, set[str]] = {tag: set() for tag in tags}
        self.is_broken = False
        self._with_more: dict[str, set[str]] = {tag: set() for tag in tags}
        self._before: dict[str, reading.Sights] = {tag: {} for tag in tags}
        self._ended: dict[str, dict[str, State]] = {tag: {} for tag in tags}
        self._most_attempts = dict.fromkeys(tags, 0)
        self._former_rows: dict[tuple[str, str], int] = {}  # of history: from before the dead letter was sent again

    def perform(self, step: Step) -> Any:
        """Carry a step out on both sides, and compare. The server's answer."""
        try:
            return self._perform(step)
        except BaseException:
            self.is_broken = True
            raise

    def _perform(self, step: Step) -> Any:
        if step.call is None:
            return self._command(*step.command)
        keys, call = self.models[tag_of(step.call.keys[0])].keys, step.call
        model = self.models[keys.tag]
        if call.script.name == "sweep":
            self.make_all_parked_stuck(keys)
        refusal = expected = None
        try:
            expected = model.call(call)
        except Refusal as e:
            refusal = str(e)
        try:
            raw = send(self.client, step)
        except ResponseError as e:
            if refusal is None or not str(e).startswith(refusal):
                raise AssertionError(f"{call.script.name} refuses with {e}, and the model with {refusal}") from e
            self.compare(keys.tag)
            return e
        assert refusal is None, f"{call.script.name} should have refused with {refusal}"
        reply = call.read(raw)
        answer = self._normal(call.script.name, model, reply)
        assert answer == expected, f"{call.script.name} answers {answer}, and the model {expected}"
        self._note_accepted(keys.tag, step, reply)
        self.compare(keys.tag)
        return raw if step.wants_raw else reply

    def _command(self, name: str, *rest: Any) -> Any:
        reply = send(self.client, Step(command=(name, *rest)))
        if name not in LOOKS:
            tag = tag_of(rest[0])
            self.models[tag].command(name, *rest)
            self.compare(tag)
        return reply

    def compare(self, tag: str) -> None:
        """All of a deployment, on both sides, and with what it was before."""
        model = self.models[tag]
        self._with_more[tag] |= {ref for ref, one in model.open.items() if one.values} | model.payloads.keys()
        found = reading.read(self.client, model.keys, self.refs[tag], sorted(self._with_more[tag]))
        assert found.strays == []
        model.learn(found.places, found.results, found.dead)
        assert found.sights == model.sights()
        assert found.results == model.results
        assert found.letters == model.letters()
        assert (found.replicas, found.payloads) == (model.replicas, model.payloads)
        self._check_moves(tag, found)
        self._check_attempts(tag, found)

    def _check_moves(self, tag: str, found: reading.Reading) -> None:
        """What is not in the table of transitions does not happen."""
        ended = {ref: State(stored.partition(b" ")[0].decode()) for ref, stored in found.results.items()}
        for ref in self.refs[tag]:
            before = self._state_before(tag, ref)
            after = found.sights[ref]["state"] if ref in found.sights else ended.get(ref)
            assert before == after or (before, after) in MOVES, f"{ref} went from {before} to {after}"
            if before == after and before in TERMINAL:
                continue
            if before is State.DEAD or (before is None and ref in found.sights):
                self._former_rows[tag, ref] = len(found.sights[ref]["history"])
        self._ended[tag] = ended

    def _state_before(self, tag: str, ref: str) -> State | None:
        if ref in self._before[tag]:
            state: State = self._before[tag][ref]["state"]
            return state
        return self._ended[tag].get(ref)

    def _check_attempts(self, tag: str, found: reading.Reading) -> None:
        """Each attempt but the first has its cause on record, and was run by the replica that is named there."""
        self._most_attempts[tag] = max(self._most_attempts[tag], self.models[tag].max_attempts or 0)
        for ref, sight in found.sights.items():
            rows = sight["history"][self._former_rows[tag, ref] :]
            raised = [row for row in rows if row["cause"].startswith("raised")]
            assert (sight["attempt"], sight["retries"]) == (1 + len(rows), len(raised))
            assert len(rows) - len(raised) < (sight["max_attempts"] or self._most_attempts[tag])
            before = self._before[tag].get(ref)
            if before is not None and len(sight["history"]) > len(before["history"]):
                (row,) = sight["history"][len(before["history"]) :]
                assert before["state"] is State.RUNNING
                assert (row["replica"], row["attempt"]) == (before["replica"], before["attempt"])
        self._before[tag] = found.sights

    def _note_accepted(self, tag: str, step: Step, reply: Any) -> None:
        assert step.call is not None
        match step.call.script.name:
            case "submit":
                refs = [row[3].decode() for row in in_groups(list(step.call.arguments[1:]), 3, 2)]
                self.accepted[tag] |= {ref for position, ref in enumerate(refs) if position not in reply}
            case "hold" if reply[0] == "new":
                self.accepted[tag].add(step.call.arguments[2].decode())
            case "forestall" if reply == "forestalled":
                self.accepted[tag].add(step.call.arguments[0])

    def _normal(self, name: str, model: Deployment, reply: Any) -> Any:
        """An answer as the model gives it: without times, and in an order."""

        def ordered(waiters: Any) -> list[tuple[str, str]]:
            return sorted((waiter.ref.decode(), waiter.waiter_id) for waiter in waiters)

        match name:
            case "claim":
                return [(one.lane, one.ref) for one in attempts_of(model.keys, reply[1])]
            case "finish" | "discard":
                return reply[0], ordered(reply[1])
            case "cancel":
                return [answer for answer, _ in reply[0]], ordered(reply[1])
            case "reject":
                return ordered(reply)
            case "release":
                return "alive" if reply.alive else (reply.requeued, reply.buried, ordered(reply.waiters))
            case "sweep":
                # A consumer that holds nothing, of a replica in no list, may be there or not: nothing depends on it.
                known = model.replicas | {one.replica for one in model.open.values()}
                return (
                    reply.promoted,
                    {ref.decode(): set(missing) for ref, missing in reply.stuck},
                    known & set(reply.without_lease),
                    {ref.decode() for ref in reply.overdue},
                )
            case "deploy" | "close":
                return None
            case _:
                return reply

    # what a test does to time

    def make_all_parked_stuck(self, keys: DeploymentKeys) -> None:
        """A sweeper looks after each, and not only after those that have waited for some seconds."""
        parked = self.client.zrange(keys.parked, 0, -1)
        if parked:
            self.client.zadd(keys.parked, dict.fromkeys(parked, 1))

    def let_time_come(self, tag: str, ref: str) -> None:
        """Of a request that waits for its time."""
        model = self.models[tag]
        one = model.open.get(ref)
        if one is None or one.state not in HELD or not one.is_later:
            return
        one.is_later = False
        if one.state is State.PARKED:
            packed = self.client.hget(model.keys.held, ref)
            held = HeldRequest.read(packed)
            self.client.hset(model.keys.held, ref, held._replace(due_ms=1).packed())
        else:
            self.client.zadd(model.keys.due, {ref: 1}, xx=True)

    def let_deadline_pass(self, tag: str, ref: str) -> None:
        one = self.models[tag].open.get(ref)
        if one is not None and one.has_deadline:
            one.is_overdue = True
            self.client.zadd(self.models[tag].keys.deadlines, {ref: 1}, xx=True)

    def expire(self, key: str) -> None:
        """As if the TTL of a key were over. With its result, the server has forgotten a request."""
        tag = tag_of(key)
        ref = key.removeprefix(self.models[tag].keys.result_prefix)
        self._ended[tag].pop(ref, None)
        self.accepted[tag].discard(ref)
        self._command("UNLINK", key)
