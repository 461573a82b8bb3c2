"""The scripts as files and as calls: headers, includes, and servers that have forgotten them. What each does: `lua/`."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

import hiredis
import pytest
from redis.exceptions import ResponseError

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call, script
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link
from millstream.broker.scripts import Finished, Submitted
from millstream.broker.states import State
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from tests.helpers import (
    CALLER,
    claim,
    deploy_config,
    finish,
    new_ref,
    read_everything,
    read_state,
    request,
    seed_running,
)

pytestmark = pytest.mark.on_cluster

FILES = {
    path.name.removesuffix(".lua"): path.read_text()
    for path in resources.files("millstream.broker").joinpath("lua").iterdir()
}
INCLUDED = {name for text in FILES.values() for name in re.findall(r"^--include (\w+)", text, re.MULTILINE)}
SCRIPTS = sorted(FILES.keys() - INCLUDED)
ADDS_TO_THE_LOAD = {"submit", "hold", "deploy", "requeue"}

Runner = Callable[[Call[Any]], Awaitable[Any]]


# the files


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_says_what_it_does_and_names_keys_and_arguments(name: str) -> None:
    shebang, summary, *rest = FILES[name].splitlines()
    head = "\n".join(line for line in rest if line.startswith("--"))

    assert shebang.startswith("#!lua")
    assert summary.startswith(f"-- {name}: ")
    assert "-- KEYS  " in head


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_scripts_that_add_to_the_load_are_refused_by_a_full_server(name: str) -> None:
    flags = FILES[name].splitlines()[0].removeprefix("#!lua").strip()

    assert flags == "" if name in ADDS_TO_THE_LOAD else flags in ("flags=allow-oom", "flags=no-writes")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_whole_once_its_includes_are_put_in(name: str) -> None:
    source = script(name).source.decode()

    assert "--include" not in source
    assert source.startswith("#!lua")
    assert len(script(name).sha) == 40


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_has_one_wrapper_of_its_name(name: str) -> None:
    assert sum(callable(getattr(module, name, None)) for module in (scripts, control_scripts)) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_asks_the_server_for_the_time_and_never_for_chance(name: str) -> None:
    source = script(name).source.decode()

    assert not re.search(r"\bos\.|math\.random", source)


# servers that have forgotten them


@pytest.fixture(params=["link", "redis-py"])
async def runner(request: pytest.FixtureRequest, settings: Settings, redis: Control) -> AsyncIterator[Runner]:
    """Both ways to run a script."""
    if request.param == "redis-py":
        yield lambda call: run(redis, call)
        return
    link = await dial_everywhere(settings, "test")
    yield link.run
    link.close()


@pytest.fixture
async def link(settings: Settings) -> AsyncIterator[Link]:
    link = await dial_everywhere(settings, "test")
    yield link
    link.close()


@pytest.mark.anyio
async def test_forgotten_script_is_sent_again(runner: Runner, redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    call = scripts.submit(keys, CALLER, request(ref))
    await redis.script_flush()

    first = await runner(call)
    known: Any = await redis.script_exists(call.script.sha.decode())
    second = await runner(call)
    await redis.script_flush()
    third = await runner(call)

    assert (first, second, third) == ({}, {0: Submitted.OPEN}, {0: Submitted.OPEN})
    assert known == [True]


@pytest.mark.anyio
async def test_forgotten_script_finishes_what_was_claimed_before(
    runner: Runner, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    call = scripts.finish(keys, one.lane, 60, (one.entry, one.ref, CALLER, "succeeded", b"value"))
    await redis.script_flush()

    assert await runner(call) == ({}, [])
    assert await runner(call) == ({0: Finished.DONE}, [])
    assert await read_state(redis, keys, one.ref) == State.SUCCEEDED


@pytest.mark.anyio
async def test_pipelined_calls_of_a_forgotten_script_are_all_carried_out_once(
    link: Link, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    refs = [new_ref() for _ in range(20)]
    await redis.script_flush()

    answers = [link.run(scripts.submit(keys, CALLER, request(ref))) for ref in refs]

    assert [await answer for answer in answers] == [{}] * 20
    assert await redis.xlen(keys.lane("normal")) == 20


@pytest.mark.anyio
async def test_calls_do_not_overtake_each_other_on_a_server_that_did_not_know_the_script(
    settings: Settings, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    first, second = new_ref(), new_ref()
    link = await dial_everywhere(settings, "test")
    await redis.script_flush()

    call = scripts.submit(keys, CALLER, request(first))
    answers = [
        link.run(call),
        link.ask("SCRIPT", "LOAD", call.script.source),  # as somebody else may do in just this moment
        link.run(scripts.submit(keys, CALLER, request(second))),
    ]

    assert [await answers[0], await answers[2]] == [{}, {}]
    assert [one.ref for one in await claim(redis, keys, 2)] == [first, second]
    link.close()


@pytest.mark.anyio
async def test_error_of_a_script_is_raised_as_the_server_put_it(
    runner: Runner, redis: Control, keys: DeploymentKeys
) -> None:
    with pytest.raises((ResponseError, hiredis.ReplyError), match="NODEPLOYMENT") as caught:
        await runner(scripts.submit(keys, CALLER, request(new_ref())))

    assert caught.value.__cause__ is None
    assert await read_everything(redis) == {}


@pytest.mark.anyio
async def test_start_answers_by_callback_even_when_the_link_is_lost(link: Link, keys: DeploymentKeys) -> None:
    replies: list[Any] = []
    link.close()

    link.start(control_scripts.backlog(keys), replies.append)
    await link.lost
    link.start(control_scripts.backlog(keys), replies.append)

    assert [type(reply) for reply in replies] == [BrokerUnavailableError] * 2


@pytest.mark.anyio
async def test_start_hands_over_what_the_call_reads(link: Link, redis: Control, keys: DeploymentKeys) -> None:
    replies: list[Any] = []
    await redis.script_flush()

    link.start(control_scripts.backlog(keys), replies.append)
    link.start(scripts.submit(keys, CALLER, request(new_ref())), replies.append)
    await link.run(control_scripts.backlog(keys))

    assert [type(reply) for reply in replies] == [control_scripts.Backlog, hiredis.ReplyError]


@pytest.mark.anyio
@pytest.mark.fake
async def test_finished_requests_leave_their_results_and_nothing_else(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    before = await read_everything(redis)
    await finish(redis, keys, *await seed_running(redis, keys, 3))

    after = await read_everything(redis)

    results = {name: value for name, value in after.items() if name.startswith(keys.result_prefix)}
    assert len(results) == 3
    assert {name: value for name, value in after.items() if name not in results} == before
