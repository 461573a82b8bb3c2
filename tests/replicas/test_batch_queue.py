"""How calls become batches: which go together, what each gets, who may leave, and what is left when all are done."""

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from millstream import serve
from millstream.errors import MillstreamError
from millstream.handles.context import Request, current
from millstream.replicas import batch_queue
from tests.helpers import wait_until
from tests.replica_helpers import Gate
from tests.replicas.batched import NEVER_S, Model, Slotted, passes, start, together

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    yield
    await wait_until(lambda: batch_queue._queues == {})
    assert [task for task in asyncio.all_tasks() if "Queue" in repr(task.get_coro())] == []


# which calls go together


async def test_calls_are_one_batch_when_there_are_enough() -> None:
    model = Model()

    values = await together(*(model.when_full(x) for x in range(6)))

    assert values == [0, 10, 20, 30, 40, 50]
    assert model.batches == [[0, 1, 2], [3, 4, 5]]


async def test_batch_that_does_not_get_full_starts_after_its_wait() -> None:
    model = Model()

    assert await together(model.soon(1), model.soon(2)) == [10, 20]
    assert model.batches == [[1, 2]]


async def test_without_a_wait_calls_of_one_pass_still_go_together() -> None:
    model = Model()

    await together(model.two_at_once(1), model.two_at_once(2))

    assert model.batches == [[1, 2]]


async def test_more_calls_than_fit_are_several_batches() -> None:
    model = Model()

    await together(*(model.soon(x) for x in range(7)))

    assert model.batches == [[0, 1, 2], [3, 4, 5], [6]]


async def test_while_a_batch_runs_the_next_one_fills_up() -> None:
    model = Model(Gate())
    calls = start(model.at_once(1))
    await wait_until(lambda: model.batches == [[1]])

    for x in (2, 3, 4):
        calls += start(model.at_once(x))
        await passes()  # the wait of the first of them is over by now, and there is no room for another batch
    model.gate.open()
    await together(*calls)

    assert model.batches == [[1], [2, 3, 4]]


async def test_so_many_batches_run_at_once() -> None:
    model = Model(Gate())

    calls = start(*(model.two_at_once(x) for x in range(7)))
    await wait_until(lambda: model.gate.inside == 2)
    await passes()
    model.gate.open()
    await together(*calls)

    assert model.gate.most == 2
    assert model.batches == [[0, 1], [2, 3], [4, 5], [6]]


async def test_two_instances_have_nothing_in_common() -> None:
    one, other = Model(), Model()

    await together(*(model.soon(x) for x in range(3) for model in (one, other)))

    assert one.batches == other.batches == [[0, 1, 2]]


async def test_function_called_as_a_function_of_the_class() -> None:
    model = Model()

    assert await Model.soon(model, 1) == 10
    assert model.batches == [[1]]


async def test_static_method() -> None:
    class Static:
        @staticmethod
        @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
        async def double(xs: list[int]) -> list[int]:
            return [2 * x for x in xs]

    assert await together(Static().double(1), Static.double(2)) == [2, 4]


async def test_overridden_method_and_the_one_below_it_are_two() -> None:
    class Derived(Model):
        @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
        async def soon(self, xs: list[Any]) -> list[Any]:
            return [await super(Derived, self).soon(x) for x in xs]

    model = Derived()

    assert await together(model.soon(1), model.soon(2)) == [10, 20]
    assert model.batches == [[1], [2]]


# what goes wrong


async def test_error_goes_to_every_caller_of_its_batch_and_to_no_other() -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> list[int]:
        if 1 in xs:
            raise ZeroDivisionError("one")
        return xs

    outcomes = await asyncio.gather(*(function(x) for x in range(4)), return_exceptions=True)

    assert list(map(repr, outcomes)) == ["ZeroDivisionError('one')"] * 2 + ["2", "3"]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
async def test_not_even_an_exit_leaves_a_caller_waiting(error: type[BaseException]) -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> list[int]:
        raise error

    async def caught(x: int) -> bool:
        with pytest.raises(error):
            await function(x)
        return True

    assert await together(caught(1), caught(2)) == [True, True]


@pytest.mark.parametrize(
    ("returned", "said"), [([1], "1 items"), ([1, 2, 3], "3 items"), (None, "NoneType"), (5, "int")]
)
async def test_anything_but_one_item_per_call_is_an_error_for_all(returned: Any, said: str) -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> Any:
        return returned

    outcomes = await asyncio.gather(function(1), function(2), return_exceptions=True)

    assert all(type(outcome) is MillstreamError for outcome in outcomes)
    assert f"function returned {said}" in str(outcomes[0]) and "2 calls" in str(outcomes[0])


async def test_after_an_error_the_next_batch_runs() -> None:
    @serve.batch(max_batch_size=1)
    async def function(xs: list[int]) -> list[float]:
        return [1 / x for x in xs]

    with pytest.raises(ZeroDivisionError):
        await function(0)

    assert await function(2) == 0.5


# callers that are cancelled


async def test_cancelled_caller_is_left_out_of_a_batch_that_has_not_started() -> None:
    model = Model()
    first, second = start(model.when_full(0), model.when_full(1))
    await passes()

    first.cancel()
    await asyncio.wait([first])

    assert await together(second, model.when_full(2), model.when_full(3)) == [10, 20, 30]
    assert model.batches == [[1, 2, 3]]


async def test_batch_whose_callers_are_all_cancelled_never_starts() -> None:
    model = Model()
    calls = start(model.when_full(1), model.when_full(2))
    await passes()

    for call in calls:
        call.cancel()
    await asyncio.wait(calls)

    assert batch_queue._queues == {} and model.batches == []


async def test_caller_cancelled_between_the_last_call_and_the_start_is_left_out() -> None:
    model = Model()
    calls = start(*(model.when_full(x) for x in range(3)))
    await asyncio.sleep(0)  # the batch is full, and has not had its first pass yet

    calls[0].cancel()
    await asyncio.wait(calls)

    assert model.batches == [[1, 2]] and calls[0].cancelled()


async def test_caller_cancelled_in_a_running_batch_disturbs_nobody() -> None:
    model = Model(Gate())
    calls = start(*(model.when_full(x) for x in range(3)))
    await wait_until(lambda: model.gate.inside == 1)

    calls[1].cancel()
    await asyncio.wait([calls[1]])
    model.gate.open()

    assert await together(calls[0], calls[2]) == [0, 20]
    assert model.batches == [[0, 1, 2]]


async def test_batch_that_all_have_left_runs_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    gate, ended = Gate(), []

    @serve.batch(max_batch_size=1)
    async def function(xs: list[int]) -> list[int]:
        await gate.wait()
        ended.append(xs)
        raise ValueError("nobody hears this")

    (call,) = start(function(1))
    await wait_until(lambda: gate.inside == 1)
    call.cancel()
    await asyncio.wait([call])
    gate.open()
    await wait_until(lambda: ended == [[1]])
    await wait_until(lambda: "failed after its callers had gone" in caplog.text)


# instances and loops


async def test_instance_without_a_dict_is_batched() -> None:
    one, other = Slotted(), Slotted()

    await together(one.run(1), other.run(2), one.run(3), other.run(4))

    assert (one.seen, other.seen) == ([1, 3], [2, 4])


async def test_instances_that_are_equal_are_still_two() -> None:
    class Equal(Model):
        def __eq__(self, _: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    one, other = Equal(), Equal()

    await together(one.soon(1), other.soon(2))

    assert (one.batches, other.batches) == ([[1]], [[2]])


async def test_nothing_keeps_an_instance_alive_after_its_calls() -> None:
    model = Model()
    model.soon.set_max_batch_size(2)
    await together(model.soon(1), model.soon(2))
    await wait_until(lambda: batch_queue._queues == {})
    watched = weakref.ref(model)

    del model

    gc.collect()
    assert watched() is None


async def test_two_loops_at_once_do_not_meet() -> None:
    model = Model()

    async def full() -> Any:
        return await together(*(model.when_full(x) for x in range(3)))

    values = await together(full(), asyncio.to_thread(asyncio.run, full()))

    assert values == [[0, 10, 20]] * 2 and model.batches == [[0, 1, 2]] * 2


# the context


async def call_for(model_id: str, call: Callable[[Any], Any], x: Any) -> Any:
    current.set(Request("app.Model", f"{x}".encode(), model_id))
    return await call(x)


async def test_calls_for_different_models_are_different_batches() -> None:
    seen = []

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> list[str]:
        request = current.get()
        assert request is not None
        seen.append((request.model_id, request.ref_id, xs))
        return [serve.get_multiplexed_model_id()] * len(xs)

    models = await together(*start(*(call_for(name, function, x) for x, name in enumerate("abab"))))

    assert models == ["a", "b", "a", "b"]
    assert seen == [("a", "", [0, 2]), ("b", "", [1, 3])]


async def test_models_share_the_number_of_batches_that_run_at_once() -> None:
    model = Model(Gate())

    calls = start(*(call_for(name, model.soon, x) for x, name in enumerate("abc")))
    await wait_until(lambda: model.gate.inside == 1)
    await passes()
    model.gate.open()
    await together(*calls)

    assert model.gate.most == 1 and model.batches == [[0], [1], [2]]


# all of it at once


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_callers_do_each_gets_its_own_and_no_rule_is_broken(seed: int) -> None:
    chance, batches, running = random.Random(seed), list[list[int]](), 0

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.001, max_concurrent_batches=2)
    async def function(xs: list[int]) -> list[Any]:
        nonlocal running
        running += 1
        batches.append(xs)
        assert running <= 2
        assert len({x % 3 for x in xs}) == 1, "two models in one batch"
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
        running -= 1
        if 13 in xs:
            raise ValueError(xs)
        return [(serve.get_multiplexed_model_id(), x) for x in xs]

    async def caller(x: int) -> Any:
        await passes(chance.randrange(30))
        return await call_for(str(x % 3), function, x)

    calls = start(*(caller(x) for x in range(200)))
    for call in chance.sample(calls, 50):
        await asyncio.sleep(0)
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    failed_together = next((xs for xs in batches if 13 in xs), [])
    for x, outcome in enumerate(outcomes):
        if isinstance(outcome, ValueError):
            assert x in failed_together
        elif not isinstance(outcome, asyncio.CancelledError):
            assert outcome == (str(x % 3), x)
    assert sum(isinstance(outcome, tuple) for outcome in outcomes) >= 140
    assert max(map(len, batches)) == 4
