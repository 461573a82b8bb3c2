"""Small things that docs/ray-compatibility.md says and that no other test shows."""

# mypy: disable-error-code="attr-defined"

import asyncio
import inspect
import json
import time
from typing import Any

import pytest

import millstream as ray
from millstream import serve
from millstream.errors import BrokerUnavailableError, DeploymentNotFoundError
from tests.ray_code.conftest import Run
from tests.timing import timed


@serve.deployment
class Model:
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def _private(self) -> str:
        return "private"

    def model_id(self) -> str:
        return serve.get_multiplexed_model_id()


@serve.deployment
class Front:
    def __init__(self, model: Any) -> None:
        self._model = model

    async def ask(self) -> Any:
        return await self._model.model_id.call()


def test_one_await_gives_the_ref_of_remote_and_the_value_of_call(run: Run) -> None:
    run(Model.bind())

    async def go() -> None:
        handle = serve.get_app_handle()
        ref = await handle.remote(1)
        assert isinstance(ref, ray.ObjectRef)
        assert await ref == await handle.call(1) == ((1,), {})

    asyncio.run(go())


def test_every_keyword_reaches_the_method(run: Run) -> None:
    assert run(Model.bind()).call(_ray_cache_refs=True) == ((), {"_ray_cache_refs": True})


def test_method_with_an_underscore_is_called_by_its_option(run: Run) -> None:
    assert run(Model.bind()).options(method_name="_private").call() == "private"


def test_last_method_named_is_the_one_that_is_called(run: Run) -> None:
    assert run(Model.bind()).nothing.options(method_name="other").model_id.call() == ""


def test_model_id_is_handed_on_to_what_a_request_calls_and_not_kept_by_the_caller(run: Run) -> None:
    handle = run(Front.bind(Model.bind()))

    assert handle.options(multiplexed_model_id="m1").ask.call() == "m1"
    assert handle.ask.call() == "", "the option is of that handle, not of what its caller does later"


def test_names_of_deployments_are_plain_in_every_application(run: Run) -> None:
    run(Front.bind(Model.bind()), name="one")
    run(Front.bind(Model.bind()), name="two")

    assert {name: set(app.deployments) for name, app in serve.status().applications.items()} == {
        "one": {"Front", "Model"},
        "two": {"Front", "Model"},
    }


def test_deployment_may_have_no_replicas() -> None:
    assert serve.deployment(num_replicas=0)(Model.func_or_class).config.num_replicas == 0


def test_handle_has_no_json_form() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(serve.get_deployment_handle("Model"))


@timed
def test_call_after_shutdown_fails_at_once_and_shutdown_twice_is_as_once(run: Run) -> None:
    handle = run(Model.bind())
    serve.shutdown()
    serve.shutdown()

    begun = time.monotonic()
    with pytest.raises((BrokerUnavailableError, DeploymentNotFoundError)):
        handle.remote()
    assert time.monotonic() - begun < 5


def test_options_of_rays_own_mechanisms_are_accepted() -> None:
    handle = serve.get_deployment_handle("Model")

    assert handle.options(use_new_handle_api=True, _prefer_local_routing=True, _by_reference=False) == handle


def test_fetch_local_is_accepted(run: Run) -> None:
    ref = run(Model.bind()).remote()

    assert ray.wait([ref], fetch_local=False) == ([ref], [])


def test_status_is_of_applications_only(run: Run) -> None:
    run(Model.bind())

    assert list(serve.status().to_dict()) == ["applications"]


def test_defaults_of_batch_are_those_of_later_ray() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(serve.batch).parameters.items()}

    assert defaults == {
        "_func": None,
        "max_batch_size": 10,
        "batch_wait_timeout_s": 0.01,
        "max_concurrent_batches": 1,
        "batch_size_fn": None,
    }


def test_user_config_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="user_config must be JSON-able"):
        serve.deployment(user_config=object())(Model.func_or_class)
