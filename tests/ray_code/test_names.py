"""Names that code written for Ray imports: its paths, with `millstream` for `ray`."""

# mypy: disable-error-code="attr-defined"

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import millstream as ray
from millstream import errors, serve
from millstream.config import AutoscalingConfig
from millstream.handles.streaming import AsyncStream
from millstream.serve.exceptions import RayServeException
from millstream.serve.handle import DeploymentHandle, DeploymentResponse, RayServeSyncHandle
from tests.ray_code.conftest import Run

MODULES = ("millstream.exceptions", "millstream.serve.config", "millstream.serve.exceptions", "millstream.serve.handle")


@serve.deployment
class Model:
    def __call__(self, x: int) -> int:
        return 10 // x


@serve.deployment
class Caller:
    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    async def is_a_handle(self) -> bool:
        return isinstance(self._model, DeploymentHandle)


def test_names_stand_for_what_they_correspond_to() -> None:
    handle, exceptions = serve.handle, serve.exceptions

    assert handle.RayServeHandle is handle.RayServeDeploymentHandle is serve.DeploymentHandle
    assert handle.RayServeSyncHandle is serve.SyncHandle
    assert handle.DeploymentResponse is ray.ObjectRef
    assert handle.DeploymentResponseGenerator is AsyncStream
    assert exceptions.RayServeException is errors.MillstreamError
    assert exceptions.DeploymentUnavailableError is errors.DeployFailedError
    assert serve.config.AutoscalingConfig is AutoscalingConfig
    assert ray.exceptions.RayTaskError is errors.TaskError
    assert ray.exceptions.RayActorError is errors.ReplicaDiedError


@pytest.mark.parametrize("name", MODULES)
def test_everything_listed_is_there_and_documented(name: str) -> None:
    module = importlib.import_module(name)

    assert sorted(module.__all__) == module.__all__
    assert [listed for listed in module.__all__ if not getattr(module, listed).__doc__] == []


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_found_from_any_folder(name: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, check=True)


def test_handles_are_of_the_classes_that_annotations_name(run: Run) -> None:
    handle = run(Caller.bind(Model.bind()))

    assert isinstance(handle, RayServeSyncHandle)
    assert handle.is_a_handle.call()
    assert isinstance(handle.is_a_handle.remote(), DeploymentResponse)


def test_except_clauses_written_for_ray_catch_what_they_are_for(run: Run) -> None:
    handle = run(Model.bind())

    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(handle.remote(0))
    assert isinstance(raised.value, ZeroDivisionError) and isinstance(raised.value, ray.exceptions.RayError)
    with pytest.raises(RayServeException, match="no deployment 'Nobody'"):
        ray.get(serve.get_deployment_handle("Nobody", sync=True).remote())
