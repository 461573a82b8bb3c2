"""What later versions of Ray Serve have on responses, and the arguments that scripts pass along."""

# mypy: disable-error-code="attr-defined"

import asyncio
import warnings
from typing import Any

import pytest

import millstream as ray
from millstream import runtime, serve
from millstream.errors import ConfigError, GetTimeoutError, RequestCancelledError
from millstream.handles import engines
from millstream.handles.waiting import wait
from tests.ray_code.conftest import Run


@serve.deployment(max_ongoing_requests=10)
class Model:
    def __init__(self, model: Any = None) -> None:
        self._model = model

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def hang(self, x: Any = None) -> None:
        await asyncio.sleep(3600)

    async def through_refs(self, x: Any) -> Any:
        response = self._model.remote(x)
        ref = await response._to_object_ref()
        return await ref, await response._to_object_ref_sync()


# of refs


def test_result_takes_rays_name_of_its_timeout(run: Run) -> None:
    handle = run(Model.bind())
    ref = handle.hang.remote()

    with pytest.raises(GetTimeoutError, match=r"after 0\.01 s"):
        ref.result(timeout_s=0.01)
    assert handle.remote(1).result(timeout_s=10) == 1
    ref.cancel()


def test_request_id_is_the_id(run: Run) -> None:
    ref = run(Model.bind()).remote()

    assert ref.request_id == ref.id == ref.hex()


def test_ref_knows_that_its_request_was_cancelled(run: Run) -> None:
    handle = run(Model.bind())
    ref = handle.hang.remote()
    by_id = ray.ObjectRef.from_id(ref.id)
    dependant = handle.remote(ref)
    good = handle.remote()

    assert not ref.cancelled() and not by_id.cancelled()
    assert ref.cancel()

    with pytest.raises(RequestCancelledError):
        ref.result(10)
    assert ref.cancelled() and ref.done()
    assert wait([by_id], timeout=10)[0] == [by_id] and by_id.cancelled()
    with pytest.raises(RequestCancelledError):
        dependant.result(10)
    assert not dependant.cancelled(), "it has failed, because what it depends on was cancelled"
    assert good.result(10) is None and not good.cancelled()


def test_request_that_was_never_sent_is_cancelled_too(run: Run) -> None:
    run(Model.bind())

    async def go() -> bool:
        task = serve.get_app_handle().hang.remote()
        await task.ref.acancel()
        return task.ref.cancelled()

    assert asyncio.run(go())


def test_response_gives_the_ref_of_its_value(run: Run) -> None:
    handle = run(Model.bind(Model.bind()))
    ref = handle.remote(1)

    assert ref._to_object_ref_sync() is ref
    assert handle.through_refs.call(2) == (2, 2)


# of serve.run and serve.start


def test_run_takes_what_ray_takes_for_http(run: Run) -> None:
    handle = run(Model.bind(), host="0.0.0.0", port=8000, route_prefix="/model", logging_config={"log_level": "INFO"})

    assert handle.call(1) == 1


def test_run_refuses_what_nobody_knows(run: Run) -> None:
    with pytest.raises(TypeError, match="unknown"):
        run(Model.bind(), unknown=1)


def test_start_takes_what_ray_takes(run: Run) -> None:
    serve.start(local=True, http_options=serve.config.HTTPOptions(port=8000), dedicated_cpu=True)

    with pytest.raises(TypeError, match="unknown"):
        serve.start(unknown=1)  # type: ignore[call-arg]


def test_start_detached_warns_that_it_ends_with_its_process(run: Run) -> None:
    assert runtime.owns_processes()

    with pytest.warns(UserWarning, match="ends with this process"):
        serve.start(local=True, detached=True)


def test_name_that_is_not_there_says_what_to_do_instead() -> None:
    with pytest.raises(AttributeError, match="web framework"):
        serve.ingress  # noqa: B018
    with pytest.raises(AttributeError, match=r"once for each"):
        serve.run_many  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        serve.nothing  # noqa: B018


# of init


def test_init_takes_what_scripts_pass_to_ray(run: Run) -> None:
    settings = engines.settings()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False, num_cpus=4) == settings
        assert ray.init("auto") == ray.init(address=None) == settings


def test_init_takes_rays_name_of_the_url(run: Run) -> None:
    with pytest.raises(ConfigError, match="not a Redis URL"):
        ray.init(address="ray://head:10001")
    with pytest.raises(ConfigError, match="two names for one thing"):
        ray.init("redis://:secret@one", address="redis://:secret@two")


def test_init_refuses_what_nobody_knows(run: Run) -> None:
    with pytest.raises(TypeError, match="unknown argument 'adress'"):
        ray.init(adress="auto")
