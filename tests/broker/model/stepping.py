"""Coroutines that talk to a server, driven by hand, one command at a time: so that a test may let others come in between
two commands, repeat one whose reply was lost, or never carry out the rest.

No event loop: what is awaited is a `Step`, and it is up to `Actor.step` what becomes of it.
"""

from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.exceptions import NoScriptError, ResponseError

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.keys import DeploymentKeys

T = TypeVar("T")
Perform = Callable[["Step"], Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One command that somebody wants to send: a call of a script, or a plain command."""

    call: Call[Any] | None = None
    command: tuple[Any, ...] = ()
    wants_raw: bool = False  # the reply as the server sends it, also of a call

    def __await__(self) -> Generator["Step", Any, Any]:
        return (yield self)


async def run(call: Call[T]) -> T:
    """As `Link.run`."""
    reply: T = await Step(call)
    return reply


async def ask(*command: Any) -> Any:
    """As `Link.ask`."""
    return await Step(command=command)


class SteppingClient:
    """What of redis-py's client the code under test uses."""

    async def evalsha(self, sha: str, count: int, *rest: Any) -> Any:
        like = _OF_REMOVAL[sha.encode()]
        return await Step(Call(like.script, rest[:count], rest[count:], like.read), wants_raw=True)

    async def exists(self, *keys: str) -> Any:
        return await ask("EXISTS", *keys)

    async def hkeys(self, key: str) -> Any:
        return await ask("HKEYS", key)


_keys = DeploymentKeys("ms", "app.Any")
_OF_REMOVAL = {
    call.script.sha: call
    for call in (
        scripts.discard(_keys, "0", 1, "", running=True),
        scripts.watch(_keys, "", "", []),
        scripts.supply_all(_keys, []),
        scripts.reject(_keys, "", 1, b""),
        scripts.keep([]),
        control_scripts.remove(_keys),
    )
}


def send(client: Any, step: Step) -> Any:
    """Carry a step out; the reply as the server sends it."""
    if step.call is None:
        return client.execute_command(*step.command)
    try:
        return client.execute_command(*step.call.command())
    except NoScriptError:
        return client.execute_command(*step.call.full_command())


class Actor:
    """Somebody half-way through something."""

    def __init__(self, work: Coroutine[Step, Any, Any]) -> None:
        self._work = work
        self.next: Step | None = None
        self._go_on(None)

    @property
    def is_through(self) -> bool:
        return self.next is None

    def step(self, perform: Perform, *, reply_is_lost: bool = False) -> None:
        """Carry out the next command; where its reply is lost, it is the next one again."""
        assert self.next is not None
        reply = perform(self.next)
        if not reply_is_lost:
            self._go_on(reply)

    def go_through(self, perform: Perform) -> None:
        while self.next is not None:
            self.step(perform)

    def crash(self) -> None:
        """The rest is never done."""
        self.next = None
        self._work.close()

    def _go_on(self, reply: Any) -> None:
        try:
            self.next = _resume(self._work, reply)
        except (StopIteration, ResponseError):
            self.next = None


def drive(work: Coroutine[Step, Any, T], perform: Perform) -> T:
    """Run a coroutine to its end; what it returns."""
    reply = None
    while True:
        try:
            step = _resume(work, reply)
        except StopIteration as e:
            value: T = e.value
            return value
        reply = perform(step)


def _resume(work: Coroutine[Step, Any, Any], reply: Any) -> Step:
    return work.throw(reply) if isinstance(reply, ResponseError) else work.send(reply)
