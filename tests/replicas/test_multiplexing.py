"""`serve.multiplexed`: what is loaded, what is kept, what goes, and who hears of what goes wrong."""

import asyncio
import copy
import gc
import weakref
from typing import Any

import pytest

from millstream import serve
from millstream.broker.definitions import has_async_methods
from millstream.errors import ConfigError, TaskError
from millstream.handles.context import Request, current
from millstream.replicas.loader import Served
from millstream.replicas.multiplexing import _disarm
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage
from tests.replicas.batched import passes, start, together

pytestmark = pytest.mark.anyio


class Model:
    def __init__(self, name: str) -> None:
        self.name = name


class Zoo:
    """Keeps two models, and remembers what it has loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.gate = Gate()
        self.gate.open()
        self.error: BaseException | None = None

    @serve.multiplexed(max_num_models_per_replica=2)
    async def get(self, model_id: str) -> Any:
        """Load a model."""
        self.loaded.append(model_id)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Model(model_id)

    @serve.multiplexed(max_num_models_per_replica=-1)
    async def get_any(self, model_id: str) -> Any:
        self.loaded.append(model_id)
        return Model(model_id)

    async def names(self, *model_ids: str) -> list[str]:
        return [(await self.get(model_id)).name for model_id in model_ids]


# the decorator


def decorate(**options: Any) -> Any:
    @serve.multiplexed(**options)
    async def load(model_id: str) -> str:
        return model_id

    return load


@pytest.mark.parametrize("limit", [1, 3, -1])
def test_limits_that_are_taken(limit: int) -> None:
    assert callable(decorate(max_num_models_per_replica=limit))


@pytest.mark.parametrize(
    ("limit", "error"),
    [(0, ConfigError), (-2, ConfigError), (1.5, TypeError), (1.0, TypeError), ("1", TypeError), (None, TypeError)],
)
def test_limit_that_makes_no_sense_is_refused(limit: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^max_num_models_per_replica="):
        decorate(max_num_models_per_replica=limit)


async def no_parameter() -> None: ...


async def three_parameters(a: Any, b: Any, c: Any) -> None: ...


@pytest.mark.parametrize("target", [lambda model_id: model_id, Model, 5, no_parameter, three_parameters])
@pytest.mark.parametrize("options", [None, {"max_num_models_per_replica": 2}])
def test_only_async_loaders_of_a_model_id_are_taken(target: Any, options: dict[str, int] | None) -> None:
    with pytest.raises(TypeError, match=r"@serve.multiplexed takes"):
        serve.multiplexed(target) if options is None else serve.multiplexed(**options)(target)


def test_loader_is_still_an_async_method() -> None:
    method = Served(Zoo(), "app.Zoo").method(b"get")

    assert (method.is_async, method.is_prompt) == (True, False)
    assert has_async_methods(Zoo)
    assert (Zoo.get.__name__, Zoo.get.__doc__) == ("get", "Load a model.")


@pytest.mark.parametrize("args", [(), (1,), (None,), ("a", "b"), (b"a",)])
async def test_loader_is_called_with_one_string(args: tuple[Any, ...]) -> None:
    zoo = Zoo()

    for loader in (zoo.get, decorate()):
        with pytest.raises(TypeError):
            await loader(*args)
    assert zoo.loaded == []


async def test_empty_id_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"options\(multiplexed_model_id=\.\.\.\)"):
        await Zoo().get(serve.get_multiplexed_model_id())


async def test_function_can_be_a_loader() -> None:
    loaded = []

    @serve.multiplexed
    async def load(model_id: str) -> str:
        loaded.append(model_id)
        return model_id.upper()

    assert [await load(model_id) for model_id in "abab"] == ["A", "B", "A", "B"]
    assert loaded == ["a", "b"]


# what is kept


async def test_model_used_longest_ago_goes() -> None:
    zoo = Zoo()

    assert await zoo.names("a", "b", "a", "c", "a", "b") == ["a", "b", "a", "c", "a", "b"]

    assert zoo.loaded == ["a", "b", "c", "b"]


async def test_three_models_are_kept_by_default() -> None:
    loaded = []

    @serve.multiplexed
    async def load(model_id: str) -> str:
        loaded.append(model_id)
        return model_id

    for model_id in "abcabcd":
        await load(model_id)

    assert loaded == ["a", "b", "c", "d"]


async def test_without_a_limit_all_are_kept() -> None:
    zoo = Zoo()
    names = [str(n) for n in range(50)]

    for name in names * 2:
        await zoo.get_any(name)

    assert zoo.loaded == names


async def test_two_instances_and_two_loaders_keep_their_own() -> None:
    one, other = Zoo(), Zoo()

    await together(one.get("a"), other.get("a"), one.get_any("a"))

    assert (one.loaded, other.loaded) == (["a", "a"], ["a"])
    assert await one.get("a") is not await one.get_any("a")


async def test_copy_of_an_instance_starts_without_models() -> None:
    zoo = Zoo()
    await zoo.get("a")
    del zoo.gate  # a lock cannot be copied

    assert copy.deepcopy(zoo).__dict__["__millstream__"]["Zoo.get"]._models == {}


async def test_nothing_keeps_an_instance_alive() -> None:
    zoo = Zoo()
    model = weakref.ref(await zoo.get("a"))
    watched = weakref.ref(zoo)

    del zoo
    await passes()
    gc.collect()

    assert watched() is None and model() is None


def test_other_loop_has_models_of_its_own_and_those_of_a_closed_one_go() -> None:
    zoo = Zoo()
    model = weakref.ref(asyncio.run(zoo.get("a")))

    again = asyncio.run(zoo.get("a"))

    gc.collect()
    assert model() is None and again.name == "a" and zoo.loaded == ["a", "a"]


async def test_class_with_slots_is_told_what_it_needs() -> None:
    class Slotted:
        __slots__ = ()

        @serve.multiplexed
        async def get(self, model_id: str) -> str:
            return model_id

    with pytest.raises(TypeError, match="add '__dict__'"):
        await Slotted().get("a")


# several requests at once


async def test_requests_for_one_model_load_it_once() -> None:
    zoo = Zoo()

    models = await together(*(zoo.get("a") for _ in range(10)))

    assert zoo.loaded == ["a"] and len(set(map(id, models))) == 1


async def test_one_model_is_loaded_at_a_time_and_never_too_many_are_kept() -> None:
    zoo = Zoo()
    zoo.gate = Gate()

    calls = start(*(zoo.get(model_id) for model_id in "abc"))
    await wait_until(lambda: zoo.gate.inside == 1)
    await passes()
    zoo.gate.open()
    await together(*calls)

    assert zoo.gate.most == 1 and zoo.loaded == ["a", "b", "c"]
    assert await zoo.names("b", "c") == ["b", "c"] and zoo.loaded == ["a", "b", "c"]


async def test_error_goes_to_all_that_wait_and_is_not_kept() -> None:
    zoo = Zoo()
    zoo.error = OSError("no such model")

    outcomes = await asyncio.gather(*(zoo.get("a") for _ in range(3)), return_exceptions=True)
    zoo.error = None

    assert list(map(repr, outcomes)) == ["OSError('no such model')"] * 3
    assert await zoo.names("a") == ["a"]
    assert zoo.loaded == ["a", "a"]


async def test_request_that_is_cancelled_does_not_end_the_loading() -> None:
    zoo = Zoo()
    zoo.gate = Gate()
    first, second = start(zoo.get("a"), zoo.get("a"))
    await wait_until(lambda: zoo.gate.inside == 1)

    first.cancel()
    await asyncio.wait([first])
    zoo.gate.open()

    assert (await second).name == "a"
    assert zoo.loaded == ["a"]


async def test_model_that_nobody_waits_for_anymore_is_there_for_the_next() -> None:
    zoo = Zoo()
    zoo.gate = Gate()
    (only,) = start(zoo.get("a"))
    await wait_until(lambda: zoo.gate.inside == 1)

    only.cancel()
    await asyncio.wait([only])
    zoo.gate.open()

    assert await zoo.names("a") == ["a"] and zoo.loaded == ["a"]


# the end of a model


class Mortal(Model):
    """Counts how often it is told to end."""

    def __init__(self, name: str, deaths: list[str]) -> None:
        super().__init__(name)
        self.deaths = deaths

    def __del__(self) -> None:
        self.deaths.append(self.name)


class AsyncMortal(Mortal):
    async def __del__(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.deaths.append(self.name)


class Touchy(Mortal):
    def __del__(self) -> None:
        super().__del__()
        raise ValueError("not again")


class Slim:
    __slots__ = ("deaths", "name")

    def __init__(self, name: str, deaths: list[str]) -> None:
        self.name, self.deaths = name, deaths

    def __del__(self) -> None:
        self.deaths.append(self.name)


class Cemetery:
    def __init__(self, kind: Any) -> None:
        self.kind, self.deaths = kind, list[str]()
        self.at_loading: list[list[str]] = []

    @serve.multiplexed(max_num_models_per_replica=1)
    async def get(self, model_id: str) -> Any:
        self.at_loading.append(list(self.deaths))
        return self.kind(model_id, self.deaths)


@pytest.mark.parametrize("kind", [Mortal, AsyncMortal, Slim])
async def test_model_that_goes_is_told_once_and_before_the_next_is_loaded(kind: Any) -> None:
    cemetery = Cemetery(kind)

    used = await cemetery.get("a")
    await cemetery.get("b")
    assert cemetery.deaths == ["a"]
    assert isinstance(used, kind) and type(used).__name__ == kind.__name__ and used.name == "a"
    del used
    gc.collect()
    _disarm(await cemetery.get("c"))  # it is there when the test ends, and nobody would await its `__del__`

    assert cemetery.at_loading == [[], ["a"], ["a", "b"]]
    assert cemetery.deaths == ["a", "b"]


async def test_error_of_a_model_that_goes_is_logged_and_hits_nobody(caplog: pytest.LogCaptureFixture) -> None:
    cemetery = Cemetery(Touchy)
    await cemetery.get("a")

    _disarm(await cemetery.get("b"))

    assert "the __del__ of model 'a' raised" in caplog.text and "not again" in caplog.text


# the id


def test_without_a_request_there_is_no_id() -> None:
    assert serve.get_multiplexed_model_id() == ""


async def test_id_is_that_of_the_request() -> None:
    async def ask(model_id: str) -> str:
        current.set(Request("app.Model", b"1", model_id))
        await asyncio.sleep(0)
        return serve.get_multiplexed_model_id()

    assert await together(*start(*map(ask, ["a", "b", ""]))) == ["a", "b", ""]


async def test_loader_runs_for_no_single_request() -> None:
    seen = []

    @serve.multiplexed
    async def load(model_id: str) -> str:
        request = current.get()
        assert request is not None
        seen.append((request.ref_id, request.model_id, serve.get_multiplexed_model_id()))
        return model_id

    current.set(Request("app.Model", b"1", "a"))
    await load("b")

    assert seen == [("", "b", "b")]
    assert serve.get_multiplexed_model_id() == "a"


async def test_models_in_a_replica(stage: Stage) -> None:
    class Served(Zoo):
        async def __call__(self, model_id: str) -> str:
            return str((await self.get(model_id)).name)

        async def seen(self) -> list[str]:
            return self.loaded

    await stage.start(Served)

    assert await together(*(stage.handle.call(name) for name in "abababab")) == list("abababab")
    assert sorted(await stage.handle.seen.call()) == ["a", "b"]
    with pytest.raises(TaskError, match="cannot be empty"):
        await stage.handle.call("")
