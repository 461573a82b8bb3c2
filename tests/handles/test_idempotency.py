"""Idempotency keys: a second request with a key is the first one, wherever it comes from."""

import asyncio
from collections import Counter
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.errors import ConfigError, RequestCancelledError, RequestTimeoutError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle
from millstream.handles.ref import ObjectRef
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import Model, Notes, blocking
from tests.helpers import wait_until
from tests.replica_helpers import Serving, cut
from tests.servers import Server

pytestmark = pytest.mark.anyio


class Ledger:
    """Notes every run."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes
        self.runs: Counter[Any] = Counter()

    async def __call__(self, x: Any) -> Any:
        self.runs[_short(x)] += 1
        if self._notes is not None:
            await self._notes.gate.wait()
        return _short(x)

    async def counted(self) -> Counter[Any]:
        return self.runs


def _short(x: Any) -> Any:
    return x if not isinstance(x, bytes) else len(x)


async def test_second_request_with_a_key_is_the_first_one(serving: Serving, notes: Notes) -> None:
    handle = serving(Ledger, notes)
    keyed = handle.options(idempotency_key="k")

    first = await keyed.remote(1)
    second = await keyed.remote(2)
    notes.gate.open()

    assert first == second and first.id == second.id
    assert [await first, await second] == [1, 1], "the first one's arguments count"
    assert await handle.counted.call() == {1: 1}


@pytest.mark.parametrize("how", ["call", "remote", "queued", "sync call", "sync remote"])
async def test_after_its_end_the_first_ones_result_is_the_answer(serving: Serving, how: str) -> None:
    handle = serving(Ledger)
    keyed = handle.options(idempotency_key="k")
    assert await keyed.call(1) == 1

    match how:
        case "call":
            value = await keyed.call(2)
        case "remote":
            value = await (await keyed.remote(2))
        case "queued":
            value = await (await keyed.options(block_until="queued").remote(2))
        case "sync call":
            value = await anyio.to_thread.run_sync(blocking(keyed).call, 2)
        case _:
            value = await anyio.to_thread.run_sync(lambda: blocking(keyed).remote(2).result(5))

    assert value == 1
    assert await handle.counted.call() == {1: 1}


async def test_map_has_a_key_for_each_of_its_items(serving: Serving) -> None:
    handle = serving(Ledger)
    keyed = handle.options(idempotency_key="k")

    first = [value async for value in keyed.map([1, 2, 3])]
    again = [value async for value in keyed.map([4, 5, 6, 7])]

    assert (first, again) == ([1, 2, 3], [1, 2, 3, 7])
    assert await anyio.to_thread.run_sync(lambda: list(blocking(keyed).map([8, 9]))) == [1, 2]


async def test_another_process_gets_the_same_request(serving: Serving, settings: Settings) -> None:
    handle = serving(Ledger)
    ref = await handle.options(idempotency_key="k").remote(1)
    code = """
        from millstream import SyncHandle

        ref = SyncHandle("Ledger", "app").options(idempotency_key="k").remote(2)
        print(ref.id, ref.result(10))
        """

    ran = await run_elsewhere(settings, code)

    assert ran.stdout == f"{ref.id} 1\n"


@pytest.mark.parametrize("kind", ["small", "large", "delayed", "parked"])
async def test_first_submits_from_many_engines_at_once_run_once(serving: Serving, kind: str) -> None:
    handle = serving(Ledger)
    upstream = await handle.remote("upstream")
    assert await upstream == "upstream"
    ref_id = upstream.id
    keyed = handle.options(idempotency_key="k", delay_s=0.05 if kind == "delayed" else 0)

    async def one_loop() -> Any:
        argument: Any = {"large": b"x" * 100_000, "parked": ObjectRef.from_id(ref_id)}.get(kind, 1)
        return await asyncio.gather(*[keyed.call(argument) for _ in range(5)])

    answers = await asyncio.gather(
        *[anyio.to_thread.run_sync(asyncio.run, one_loop()) for _ in range(8)],
        anyio.to_thread.run_sync(blocking(keyed).call, ObjectRef.from_id(ref_id) if kind == "parked" else 1),
    )

    assert len({str(value) for answer in answers[:-1] for value in answer} | {str(answers[-1])}) == 1
    runs = await handle.counted.call()
    assert sum(runs.values()) == (3 if kind == "parked" else 2) - (kind == "parked"), runs


@pytest.mark.parametrize("kind", ["delayed", "parked", "large"])
async def test_several_at_once_of_what_takes_more_than_one_step_are_one(
    serving: Serving, notes: Notes, kind: str
) -> None:
    handle = serving(Ledger, notes)
    upstream = await handle.remote("upstream")
    keyed = handle.options(idempotency_key="k", delay_s=0.05 if kind == "delayed" else 0)
    argument: Any = {"large": b"x" * 100_000, "parked": upstream}.get(kind, 1)

    refs = await asyncio.gather(*[keyed.remote(argument) for _ in range(10)])
    notes.gate.open()

    assert len(set(refs)) == 1
    values = await asyncio.wait_for(asyncio.gather(*refs), 5)
    assert len({str(value) for value in values}) == 1
    assert engines.current().chores._sending == {}


async def test_large_first_request_wins_over_a_small_second_one(serving: Serving) -> None:
    handle = serving(Ledger)
    await handle.call("connected")
    keyed = handle.options(idempotency_key="k")

    large, small = keyed.call(b"x" * 1_000_000), keyed.call(2)

    assert [await large, await small] == [1_000_000, 1_000_000]


async def test_different_keys_methods_and_deployments(serving: Serving) -> None:
    handle, other = serving(Ledger), serving(Ledger)

    values = [
        await handle.options(idempotency_key="a").call(1),
        await handle.options(idempotency_key="b").call(2),
        await other.options(idempotency_key="a").call(3),
    ]

    assert values == [1, 2, 3]
    assert await handle.counted.options(idempotency_key="a").call() == 1, "a key is the deployment's, not the method's"


async def test_key_is_free_again_when_its_result_has_expired(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    ref = await handle.options(idempotency_key="k").remote(1)
    assert await ref == 1

    await redis.delete(DeploymentKeys("ms", "app.Ledger").result(ref.id[-22:]))

    assert await handle.options(idempotency_key="k").call(2) == 2


async def test_result_stays_for_others_though_its_caller_has_read_it(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger).options(idempotency_key="k")
    prefix = DeploymentKeys("ms", "app.Ledger").result_prefix

    await handle.call(1)
    await (await handle.remote(1))
    await anyio.to_thread.run_sync(blocking(handle).call, 1)
    engines.current().drops.flush()
    await handle.call(1)

    assert len(await redis.keys(f"{prefix}*")) == 1


async def test_failure_is_a_result_too(serving: Serving) -> None:
    class Fails:
        async def __call__(self, x: int) -> None:
            raise ValueError(x)

    handle = serving(Fails).options(idempotency_key="k")

    for x in (1, 2):
        with pytest.raises(ValueError, match="1"):
            await handle.call(x)


async def test_cancelled_request_keeps_its_key(serving: Serving, notes: Notes) -> None:
    handle = serving(Ledger, notes).options(idempotency_key="k")
    ref = await handle.remote(1)

    await ref.acancel()

    with pytest.raises(RequestCancelledError):
        await handle.call(2)


async def test_time_of_the_first_one_counts(serving: Serving) -> None:
    handle = serving(Model).options(idempotency_key="k")
    first = handle.options(timeout_s=0.3).call(1)
    second = handle.options(timeout_s=10).call(2)
    third = handle.options(timeout_s=0.05).call(3)

    done, _ = await asyncio.wait([first, second, third], timeout=0.15)
    assert not done
    errors = await asyncio.wait_for(asyncio.gather(first, second, third, return_exceptions=True), 2)

    assert {type(error) for error in errors} == {RequestTimeoutError}


async def test_cancel_of_one_waiting_call_leaves_the_others_waiting(serving: Serving, notes: Notes) -> None:
    handle = serving(Ledger, notes).options(idempotency_key="k")
    first, second = handle.call(1), handle.call(1)

    first.cancel()
    notes.gate.open()

    assert await second == 1


async def test_second_one_that_comes_when_the_first_one_runs_is_matched(serving: Serving, notes: Notes) -> None:
    handle = serving(Ledger, notes).options(idempotency_key="k")
    await handle.remote(1)

    assert isinstance(await asyncio.wait_for(handle.remote(1), 1), ObjectRef)
    assert isinstance(await asyncio.wait_for(anyio.to_thread.run_sync(blocking(handle).remote, 1), 1), ObjectRef)


async def test_lost_connections_make_no_second_run(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await handle.call("connected")

    futures = [handle.options(idempotency_key=str(x % 50)).call(x % 50) for x in range(500)]
    await cut(redis, *[f"ms:{what}:{engines.current().name}" for what in ("client", "replies")])
    futures += [handle.options(idempotency_key=str(x % 50)).call(x % 50) for x in range(500)]

    assert await asyncio.wait_for(asyncio.gather(*futures), 20) == [x % 50 for x in range(500)] * 2
    assert set((await handle.counted.call()).values()) == {1}


async def test_request_with_a_key_survives_a_restart_of_the_server(own_server: Server, serving_there: Serving) -> None:
    handle = serving_there(Ledger)
    keyed = handle.options(idempotency_key="k")
    assert await keyed.call(1) == 1

    own_server.kill()
    again = keyed.call(2)
    own_server.start()

    assert await asyncio.wait_for(again, 10) == 1
    assert await handle.counted.call() == {1: 1}


@pytest.mark.parametrize("key", ["", 1, b"k"])
def test_key_must_be_a_text(key: Any) -> None:
    with pytest.raises(ConfigError, match="idempotency_key="):
        DeploymentHandle("Model").options(idempotency_key=key)


def test_stream_cannot_have_a_key() -> None:
    with pytest.raises(ConfigError, match=r"idempotency_key='k' is not for streams"):
        DeploymentHandle("Model").options(stream=True, idempotency_key="k")._options.streaming  # noqa: B018


async def test_any_text_is_a_key(serving: Serving) -> None:
    handle = serving(Ledger)

    values = [await handle.options(idempotency_key=key).call(key) for key in ("ä", " ", "x" * 10_000, "a b\n{}~:")]

    assert values == ["ä", " ", "x" * 10_000, "a b\n{}~:"]
    await wait_until(lambda: not engines.current().pending)
