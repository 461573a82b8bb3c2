"""What a launcher remembers of a replica process, from what it was told and what it says."""

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from millstream.broker.records import Current
from millstream.config import DeploymentConfig
from millstream.replicas.control import Control
from millstream.replicas.process import ReplicaProcess

pytestmark = pytest.mark.anyio


def config(revision: str) -> Current:
    return Current("v1", revision, DeploymentConfig(user_config=revision))


@pytest.fixture
def process() -> Iterator[ReplicaProcess]:
    ours, theirs = socket.socketpair()
    parent: Any = None
    process = ReplicaProcess("r-1", "app.Model", config("c0"), os.getpid(), parent, Control(ours))
    yield process
    if process._pidfd is not None:
        os.close(process._pidfd)
    for sock in (ours, theirs):
        sock.close()


async def test_replica_works_by_what_it_was_told_once_it_says_so(process: ReplicaProcess) -> None:
    await process.update(config("c1"))
    told = process.heading, process.is_updating, process.works_by.revision
    process.hear({"configured": "c1"})

    assert told == ("c1", True, "c0")
    assert (process.heading, process.is_updating, process.works_by) == ("c1", False, config("c1"))


async def test_answer_to_an_earlier_config_is_not_the_last_word(process: ReplicaProcess) -> None:
    await process.update(config("c1"))
    await process.update(config("c2"))

    process.hear({"configured": "c1"})

    assert (process.heading, process.is_updating, process.works_by) == ("c2", True, config("c1"))


async def test_answer_to_the_last_config_stands_for_those_that_were_skipped(process: ReplicaProcess) -> None:
    await process.update(config("c1"))
    await process.update(config("c2"))

    process.hear({"configured": "c2"})

    assert not process.is_updating and process.works_by == config("c2")


@pytest.mark.parametrize("answer", [{"refused": "c1", "message": "", "traceback": ""}, {"stuck": "c1"}])
async def test_replica_that_did_not_take_it_over_is_not_told_the_same_again(
    process: ReplicaProcess, answer: dict[str, Any]
) -> None:
    await process.update(config("c1"))

    process.hear(answer)

    assert (process.heading, process.is_updating, process.works_by.revision) == ("c1", False, "c0")
    assert process.stuck_at == answer.get("stuck", "")


async def test_first_reason_to_kill_it_is_the_cause_of_its_death(
    process: ReplicaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = list[int]()
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))

    process.kill("killed: ill")
    process.kill("killed: too late")
    process.kill()

    assert process.condemned == "killed: ill"
    assert killed == [os.getpid()] * 3
    await asyncio.sleep(0)


async def test_process_that_was_reaped_before_it_could_be_watched_has_died_after_its_last_words() -> None:
    ours, theirs = socket.socketpair()
    gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await gone.wait()
    parent: Any = None
    process = ReplicaProcess("r-1", "app.Model", config("c0"), gone.pid, parent, Control(ours))
    deaths: list[tuple[ReplicaProcess, Any]] = []

    process.watch(lambda dead: deaths.append((dead, dead.failure)))
    await Control(theirs).send({"failed": "no model", "traceback": "..."})
    theirs.close()
    await process.listen(ReplicaProcess.hear)

    assert deaths == [(process, ("no model", "..."))]
    ours.close()
