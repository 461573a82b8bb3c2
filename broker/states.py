"""The states of a request, a sentence each, and the table of transitions that the scripts carry out."""

from enum import StrEnum


class State(StrEnum):
    """Where a request is. Terminal states are kept under the result key until its TTL."""

    PARKED = "parked"  # waits for refs among its arguments; holds no slot and no place in a queue
    DELAYED = "delayed"  # waits for its time: asked for later, or to be tried again
    QUEUED = "queued"  # an entry in a lane that no replica has taken
    RUNNING = "running"  # an entry in some replica's pending list
    SUCCEEDED = "succeeded"  # has a value
    FAILED = "failed"  # its code, or that of a request it depends on, raised
    DEAD = "dead"  # attempts used up; kept as a dead letter
    CANCELLED = "cancelled"  # somebody cancelled it, or its deployment was deleted
    TIMED_OUT = "timed_out"  # its deadline passed before it had ended


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.DEAD, State.CANCELLED, State.TIMED_OUT})


class Event(StrEnum):
    """What moves a request. Each is one script."""

    SUBMIT = "submit"  # a caller sends it
    PARK = "park"  # a caller sends it, with refs that have no value yet
    DELAY = "delay"  # a caller sends it for later
    SUPPLY = "supply"  # the last missing value arrived
    SUPPLY_EARLY = "supply_early"  # it arrived before the time that the request waits for, too
    REJECT = "reject"  # a request it depends on failed
    PROMOTE = "promote"  # its time has come (sweep)
    CLAIM = "claim"  # a replica takes it
    RETRY = "retry"  # its code raised, and is to be tried again after a pause: next attempt
    POSTPONE = "postpone"  # the replica does not know the method, and one of another version may: no attempt
    HAND_BACK = "hand_back"  # the replica did not start it and gives it back: no attempt
    RELEASE = "release"  # its replica is dead: next attempt, in the lane `returned`
    BURY = "bury"  # its replica is dead and its attempts are used up, or it is nothing that a replica can read
    SUCCEED = "succeed"  # finish with a value
    FAIL = "fail"  # finish with an error
    CANCEL = "cancel"  # a caller cancels it
    FORESTALL = "forestall"  # its caller cancels it while it may still be on its way here
    EXPIRE = "expire"  # its deadline has passed, by the server's clock
    DISCARD = "discard"  # its deployment is deleted
    REQUEUE = "requeue"  # an operator sends a dead letter again


# None stands for "unknown to the server". What is not in the table is refused and changes nothing.
TRANSITIONS: dict[tuple[State | None, Event], State] = {
    (None, Event.SUBMIT): State.QUEUED,
    (None, Event.PARK): State.PARKED,
    (None, Event.DELAY): State.DELAYED,
    (None, Event.FORESTALL): State.CANCELLED,
    (State.PARKED, Event.SUPPLY): State.QUEUED,
    (State.PARKED, Event.SUPPLY_EARLY): State.DELAYED,
    (State.PARKED, Event.REJECT): State.FAILED,
    (State.DELAYED, Event.PROMOTE): State.QUEUED,
    (State.QUEUED, Event.CLAIM): State.RUNNING,
    (State.RUNNING, Event.RETRY): State.DELAYED,
    (State.RUNNING, Event.POSTPONE): State.DELAYED,
    (State.RUNNING, Event.HAND_BACK): State.QUEUED,
    (State.RUNNING, Event.RELEASE): State.QUEUED,
    (State.RUNNING, Event.BURY): State.DEAD,
    (State.RUNNING, Event.SUCCEED): State.SUCCEEDED,
    (State.RUNNING, Event.FAIL): State.FAILED,
    (State.PARKED, Event.CANCEL): State.CANCELLED,
    (State.DELAYED, Event.CANCEL): State.CANCELLED,
    (State.QUEUED, Event.CANCEL): State.CANCELLED,
    (State.RUNNING, Event.CANCEL): State.CANCELLED,
    (State.PARKED, Event.EXPIRE): State.TIMED_OUT,
    (State.DELAYED, Event.EXPIRE): State.TIMED_OUT,
    (State.QUEUED, Event.EXPIRE): State.TIMED_OUT,
    (State.RUNNING, Event.EXPIRE): State.TIMED_OUT,
    (State.PARKED, Event.DISCARD): State.CANCELLED,
    (State.DELAYED, Event.DISCARD): State.CANCELLED,
    (State.QUEUED, Event.DISCARD): State.CANCELLED,
    (State.RUNNING, Event.DISCARD): State.CANCELLED,
    (State.DEAD, Event.REQUEUE): State.QUEUED,
}
