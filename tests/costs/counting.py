"""What requests cost, in numbers that are the same on a fast machine and on a slow one: commands, bytes, calls, tasks."""

import _weakrefset
import asyncio
import concurrent.futures
import contextlib
import selectors
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

import millstream
from millstream.broker.call import script
from millstream.broker.link import Link
from millstream.handles import engines
from tests.costs.rig import Rig

TESTS = str(Path(__file__).parent.parent)
WHERE = "docs/performance.md, Costs that are watched, says how this is counted and where to look"


def check(workload: str, counted: Mapping[str, float], bounds: Mapping[str, float], details: object = "") -> None:
    """Fail for all that was counted above its bound; of each request."""
    beyond = [
        f"{what} per request: {counted[what]:.4g}, and the bound is {bound:g}"
        for what, bound in bounds.items()
        if counted[what] > bound
    ]
    assert not beyond, "\n".join((f"{workload} costs more than it did:", *beyond, str(details), WHERE))


def _folder_of(module: ModuleType) -> str:
    return str(Path(str(module.__file__)).parent)


class Commands:
    """What the server was asked, and what its scripts asked it in turn; both by name."""

    def __init__(self, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server = server
        self._sent: list[str] = []  # all threads append to it
        self._scripts = {
            text: f"{name}.lua"
            for name in ("submit", "claim", "finish", "hand_back", "watch")
            for text in (script(name).sha, script(name).source)
        }
        monkeypatch.setattr(Link, "send", self._noting(Link.send))
        self.sent: Counter[str] = Counter()
        self.in_scripts: Counter[str] = Counter()
        self.bytes_in = self.bytes_out = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what comes inside."""
        own_in, own_out = self._bytes_of_a_look()
        calls, (bytes_in, bytes_out) = self._calls(), self._bytes()
        self._sent.clear()
        yield
        self.sent = Counter(self._sent)
        bytes_in_after, bytes_out_after = self._bytes()
        self.bytes_in, self.bytes_out = bytes_in_after - bytes_in - own_in, bytes_out_after - bytes_out - own_out
        self.in_scripts = self._calls() - calls
        for name, count in self.sent.items():
            self.in_scripts[name.partition(" ")[0]] -= count
        del self.in_scripts["info"]  # our own

    def per_request(self, requests: int) -> dict[str, float]:
        """Those that there is one of for each request, and the others, which batches share, in sums."""
        sent, inside = self.sent.copy(), self.in_scripts.copy()
        counted = {
            "submit scripts": sent.pop("evalsha submit.lua", 0),
            "claim scripts": (claims := sent.pop("evalsha claim.lua", 0)),
            "claims and reads": claims + sent.pop("xreadgroup", 0),
            "finish scripts": sent.pop("evalsha finish.lua", 0),
            "other commands sent": sent.total() - sent["client"],  # CLIENT UNBLOCK holds the replica
            "XADD": inside.pop("xadd", 0),
            "SETEX": inside.pop("setex", 0),
            "other commands in scripts": inside.total(),
            "bytes to the server": self.bytes_in,
            "bytes from the server": self.bytes_out,
        }
        return {what: count / requests for what, count in counted.items()}

    def __str__(self) -> str:
        return f"sent: {dict(self.sent)}; run by scripts: {dict(self.in_scripts)}"

    def _noting(self, send: Callable[..., None]) -> Callable[..., None]:
        def noting(link: Link, callback: Any, *command: Any) -> None:
            is_script = command[0] in ("EVALSHA", "EVAL")
            self._sent.append(f"evalsha {self._scripts.get(command[1], '?')}" if is_script else command[0].lower())
            send(link, callback, *command)

        return noting

    def _calls(self) -> Counter[str]:
        calls: Counter[str] = Counter()
        for name, row in self._server.info("commandstats").items():
            calls[name.removeprefix("cmdstat_").partition("|")[0]] += row["calls"]
        return calls

    def _bytes(self) -> tuple[int, int]:
        stats = self._server.info("stats")
        return stats["total_net_input_bytes"], stats["total_net_output_bytes"]

    def _bytes_of_a_look(self) -> tuple[int, int]:
        (first_in, first_out), (second_in, second_out) = self._bytes(), self._bytes()
        return second_in - first_in, second_out - first_out


class Calls:
    """Calls of Python functions, and of C functions by Python code, on the side of the callers and of the replica.

    Without those within the loop: how often it turns is up to the machine. What others call there counts.
    """

    OURS = _folder_of(millstream)
    NOT_COUNTED = (
        TESTS, _folder_of(asyncio), _folder_of(concurrent.futures),
        *(str(module.__file__) for module in (selectors, threading, contextlib, weakref, _weakrefset)),
    )  # fmt: skip

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.by: dict[str, Counter[str]] = {}  # whose thread -> name of a function

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what comes inside."""
        self.by = {"callers": Counter(), "engine": Counter(), "replica": Counter()}
        before = sys.getprofile()
        engines.background().run(_profile(self._hook("engine")))
        self._rig.serving.run(_profile(self._hook("replica")))
        sys.setprofile(self._hook("callers"))
        try:
            yield
        finally:
            sys.setprofile(before)
            engines.background().run(_profile(None))
            self._rig.serving.run(_profile(None))

    def per_request(self, requests: int) -> dict[str, float]:
        client = self.by["callers"].total() + self.by["engine"].total()
        return {"calls by the client": client / requests, "calls by the replica": self.by["replica"].total() / requests}

    def __str__(self) -> str:
        return "\n".join(f"most calls by the {who}: {dict(count.most_common(25))}" for who, count in self.by.items())

    def _hook(self, who: str) -> Callable[[FrameType, str, Any], None]:
        count, skipped, ours = self.by[who], self.NOT_COUNTED, self.OURS

        def hook(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                file = frame.f_code.co_filename
                caller = frame.f_back
                if not file.startswith(skipped) or (caller is not None and caller.f_code.co_filename.startswith(ours)):
                    count[frame.f_code.co_qualname] += 1
            elif event == "c_call" and not frame.f_code.co_filename.startswith(skipped):
                count[argument.__qualname__] += 1

        return hook


async def _profile(hook: Callable[[FrameType, str, Any], None] | None) -> None:
    sys.setprofile(hook)


class Tasks:
    """Tasks made by code that is not of the tests."""

    def __init__(self, rig: Rig) -> None:
        self._loops = rig.loops
        self._names: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        for who, loops in self._loops.items():
            for loop in loops:
                loop.set_task_factory(self._noting(who))
        try:
            yield
        finally:
            for loops in self._loops.values():
                for loop in loops:
                    loop.set_task_factory(None)

    def per_request(self, requests: int) -> dict[str, float]:
        made = Counter(who for who, _ in self._names)
        return {"tasks of the client": made["client"] / requests, "tasks of the replica": made["replica"] / requests}

    def __str__(self) -> str:
        return f"tasks: {dict(Counter(self._names))}"

    def _noting(self, who: str) -> Any:
        def make(
            loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **more: Any
        ) -> asyncio.Task[Any]:
            code = getattr(coroutine, "cr_code", None)
            if code is None or not code.co_filename.startswith(TESTS):
                self._names.append((who, getattr(coroutine, "__qualname__", "?")))
            return asyncio.Task(coroutine, loop=loop, **more)

        return make
