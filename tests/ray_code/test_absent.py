"""What Ray Serve has and millstream has not is refused, with a text that names it: it is never ignored in silence."""

# mypy: disable-error-code="attr-defined"

import importlib
from typing import Any

import pytest

from millstream import serve
from millstream.errors import ConfigError
from tests.ray_code.conftest import Run


@serve.deployment
class Model:
    def __call__(self) -> str:
        return "called"


@pytest.mark.parametrize(
    "option",
    [
        "init_args",
        "is_driver_deployment",
        "max_constructor_retry_count",
        "rolling_update_percentage",
        "max_replicas_per_node",
        "placement_group_bundles",
        "request_router_config",
        "gang_scheduling_config",
    ],
)
def test_option_of_a_deployment_that_is_not_there_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{option}'; known are"):
        serve.deployment(**{option: 1})(Model.func_or_class)


@pytest.mark.parametrize("option", ["session_id", "request_serialization", "response_serialization"])
def test_option_of_a_handle_that_is_not_there_is_refused(option: str) -> None:
    handle = serve.get_deployment_handle("Model")

    with pytest.raises(TypeError, match=f"unknown option '{option}'; known are"):
        handle.options(**{option: "x"})


@pytest.mark.parametrize("method", ["broadcast", "choose_replica", "dispatch"])
def test_method_of_a_handle_that_is_not_there_is_refused(method: str) -> None:
    handle: Any = serve.get_deployment_handle("Model")

    with pytest.raises(TypeError, match="a handle is not called itself"):
        getattr(handle, method)()


@pytest.mark.parametrize("name", ["dag", "drivers", "task_consumer", "schema", "gradio_integrations"])
def test_module_that_is_not_there_cannot_be_imported(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"millstream.serve.{name}"):
        importlib.import_module(f"millstream.serve.{name}")


def test_field_of_the_autoscaling_config_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option 'aggregation_function'"):
        serve.deployment(autoscaling_config={"aggregation_function": "max"})(Model.func_or_class)


def test_custom_scaling_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="use 'backlog' or 'ray'"):
        serve.deployment(autoscaling_config={"policy": {"policy_function": "module:function"}})(Model.func_or_class)


def test_environment_does_not_change_the_kind_of_a_handle(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_DEPLOYMENT_HANDLE_IS_SYNC", "1")
    monkeypatch.setenv("RAY_SERVE_FORCE_LOCAL_TESTING_MODE", "0")
    run(Model.bind())

    assert type(serve.get_app_handle()) is serve.DeploymentHandle
