"""deploy.lua, withdraw.lua, note.lua, close.lua and replace.lua: what is in force, and what is taken back."""

from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import Withdrawn
from millstream.broker.keys import DeploymentKeys, Keys
from tests.helpers import read_everything

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

ALL = Keys("ms")


async def deploy(
    redis: Control, keys: DeploymentKeys, revision: str, code: str = "code", *, configured: bool = False
) -> str:
    limits = ("3", "60", "", "")
    present: Any = await redis.hget(keys.config, "version")
    staying = (present or b"").decode(), f"config {revision}, as before"
    call = control_scripts.deploy(
        keys, revision, code, f"config {revision}", b"defined", limits, configured=configured, staying=staying
    )
    return await run(redis, call)


async def withdraw(redis: Control, keys: DeploymentKeys, revision: str, back_to: str) -> Withdrawn:
    call = control_scripts.withdraw(
        keys, revision, back_to, f"config {back_to}", "it raised", "Traceback ...", ("7", "70", "", "")
    )
    return await run(redis, call)


async def fields(redis: Control, key: str) -> dict[str, str]:
    found: Any = await redis.hgetall(key)
    return {name.decode(): value.decode() for name, value in found.items()}


# deploy


async def test_first_deploy_makes_a_version(redis: Control, keys: DeploymentKeys) -> None:
    version = await deploy(redis, keys, "r1")

    assert version == "r1"
    assert await fields(redis, keys.config) == {
        "version": "r1", "revision": "r1", "code": "code", "configured": "", "config": "config r1",
        "max_attempts": "3", "result_ttl_s": "60",
    }  # fmt: skip
    assert await redis.get(keys.definition) == b"defined"


async def test_version_stays_while_the_code_does(redis: Control, keys: DeploymentKeys) -> None:
    versions = [await deploy(redis, keys, f"r{n}", code) for n, code in enumerate(["a", "a", "b", "b", "a"])]

    assert versions == ["r0", "r0", "r2", "r2", "r4"]


async def test_version_that_nobody_signed_a_config_for_does_not_stay(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")
    call = control_scripts.deploy(
        keys, "r2", "code", "for r2", b"defined", ("3", "60", "", ""), configured=False, staying=("r0", "for r0")
    )

    assert [await run(redis, call) for _ in range(2)] == ["r2", "r2"]
    assert (await fields(redis, keys.config))["config"] == "for r2"


async def test_config_is_the_one_that_was_signed_for_its_version(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")
    first = (await fields(redis, keys.config))["config"]
    await deploy(redis, keys, "r2")
    second = (await fields(redis, keys.config))["config"]
    await deploy(redis, keys, "r3", "edited")

    assert [first, second, (await fields(redis, keys.config))["config"]] == [
        "config r1", "config r2, as before", "config r3",
    ]  # fmt: skip


async def test_unknown_code_is_another_one_each_time(redis: Control, keys: DeploymentKeys) -> None:
    assert [await deploy(redis, keys, f"r{n}", "") for n in range(2)] == ["r0", "r1"]


async def test_object_cannot_forget_its_user_config(redis: Control, keys: DeploymentKeys) -> None:
    given = [
        await deploy(redis, keys, f"r{n}", configured=configured) for n, configured in enumerate([False, True, True])
    ]
    forgotten = await deploy(redis, keys, "r3", configured=False)

    assert (given, forgotten) == (["r0", "r0", "r0"], "r3")


async def test_what_could_not_start_is_tried_as_a_new_version(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")
    await run(redis, control_scripts.note(keys, "r1", {"state": "DEPLOY_FAILED", "failed_revision": "r1"}))

    assert await deploy(redis, keys, "r2") == "r2"
    assert await deploy(redis, keys, "r3") == "r2"


async def test_deploying_twice_is_as_once(redis: Control, keys: DeploymentKeys) -> None:
    for revision, code, configured in [("r1", "a", True), ("r2", "a", True), ("r3", "a", False), ("r4", "", False)]:
        first = await deploy(redis, keys, revision, code, configured=configured)
        before = await read_everything(redis)

        assert await deploy(redis, keys, revision, code, configured=configured) == first
        assert await read_everything(redis) == before


async def test_new_deploy_ends_the_troubles_of_the_last_one_and_a_target_of_zero(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy(redis, keys, "r1")
    troubles = ("state", "message", "traceback", "failed_revision", "last_death")
    refusal = ("refused_revision", "refused_message", "refused_traceback")
    noted = {**dict.fromkeys((*troubles, *refusal), "x"), "target": "0", "override": "{}", "reason": "idle"}
    await run(redis, control_scripts.note(keys, "r1", noted))

    await deploy(redis, keys, "r2")

    assert await fields(redis, keys.status) == {"override": "{}", "reason": "idle"}


async def test_new_deploy_keeps_any_other_target(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")
    await run(redis, control_scripts.decide(keys, 1, 3, "", {}))

    await deploy(redis, keys, "r2")

    assert (await fields(redis, keys.status))["target"] == "3"


# withdraw


async def test_withdrawn_config_gives_way_to_the_one_before(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")
    await deploy(redis, keys, "r2")

    answer = await withdraw(redis, keys, "r2", "r1")

    config, status = await fields(redis, keys.config), await fields(redis, keys.status)
    assert answer is Withdrawn.WITHDRAWN
    assert (config["version"], config["revision"], config["config"], config["max_attempts"], config["result_ttl_s"]) == (
        "r1", "r1", "config r1", "7", "70",
    )  # fmt: skip
    assert status == {"refused_revision": "r2", "refused_message": "it raised", "refused_traceback": "Traceback ..."}


async def test_withdrawal_ends_a_failure_to_start_with_that_config(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")
    await deploy(redis, keys, "r2")
    await run(redis, control_scripts.note(keys, "r2", {"state": "DEPLOY_FAILED", "failed_revision": "r2"}))

    await withdraw(redis, keys, "r2", "r1")

    assert "state" not in await fields(redis, keys.status)


@pytest.mark.parametrize("deployed", [["r1", "r2", "r3"], ["r1", "r2"]])
async def test_config_that_is_not_in_force_any_more_is_not_withdrawn(
    redis: Control, keys: DeploymentKeys, deployed: list[str]
) -> None:
    for revision in deployed:
        await deploy(redis, keys, revision)
    if "r3" not in deployed:
        await withdraw(redis, keys, "r2", "r1")  # another replica has refused it, too
    before = await read_everything(redis)

    assert await withdraw(redis, keys, "r2", "r1") is Withdrawn.SUPERSEDED
    assert await read_everything(redis) == before


async def test_there_is_no_way_back_and_forth(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")
    await deploy(redis, keys, "r2")
    await withdraw(redis, keys, "r2", "r1")

    assert await withdraw(redis, keys, "r1", "r2") is Withdrawn.SPENT
    assert (await fields(redis, keys.config))["revision"] == "r1"


# note


async def test_note_is_written_to_what_is_deployed_only(redis: Control, keys: DeploymentKeys) -> None:
    assert await run(redis, control_scripts.note(keys, "", {"last_death": "x"})) == 0
    await deploy(redis, keys, "r1")

    written = [
        await run(redis, control_scripts.note(keys, revision, {"by": revision})) for revision in ("r0", "r1", "")
    ]

    assert written == [0, 1, 1]
    assert await fields(redis, keys.status) == {"by": ""}


# close


async def test_closed_deployment_takes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r1")

    assert [await run(redis, control_scripts.close(keys, "r1")) for _ in range(2)] == [1, 1]
    with pytest.raises(Exception, match="NODEPLOYMENT"):
        await run(redis, scripts.submit(keys, "", (b"r" * 22, "normal", b"m", "", b"")))
    assert not await redis.exists(keys.definition)


async def test_deployment_that_was_deployed_anew_is_not_closed(redis: Control, keys: DeploymentKeys) -> None:
    await deploy(redis, keys, "r2")
    before = await read_everything(redis)

    assert await run(redis, control_scripts.close(keys, "r1")) == 0
    assert await read_everything(redis) == before


# replace


async def test_record_is_replaced_if_it_is_the_one_that_was_read(redis: Control) -> None:
    async def replace(read: str, text: str) -> int:
        return await run(redis, control_scripts.replace(ALL, "app", read.encode(), text))

    assert [await replace("", "a"), await replace("", "b"), await replace("a", "c"), await replace("a", "d")] == [
        1, 0, 1, 0,
    ]  # fmt: skip
    assert await redis.hget(ALL.apps, "app") == b"c"
