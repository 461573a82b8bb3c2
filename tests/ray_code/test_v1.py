"""Ray Serve's first API: `D.deploy()`, and what goes with it."""

# mypy: disable-error-code="attr-defined"

import asyncio

import pytest

from millstream import serve
from millstream.errors import DeploymentNotFoundError
from tests.ray_code.conftest import Run


@serve.deployment
class Adder:
    def __init__(self, plus: int, times: int = 1) -> None:
        self._plus, self._times = plus, times

    def __call__(self, x: int) -> int:
        return (x + self._plus) * self._times


@pytest.fixture(autouse=True)
def local(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_LOCAL", "1")


def test_deployment_is_deployed_called_and_deleted_by_itself() -> None:
    Adder.deploy(1, times=10)

    assert Adder.get_handle().call(2) == 30
    assert list(serve.status().applications) == ["Adder"]

    Adder.delete()

    assert serve.status().applications == {}
    Adder.delete()  # twice is as once


def test_deploying_again_replaces_it() -> None:
    Adder.deploy(1)
    Adder.options(name="Other").deploy(5)
    Adder.deploy(2)

    assert Adder.get_handle().call(0) == 2
    assert serve.get_deployment("Other").get_handle().call(0) == 5


def test_handle_may_be_one_for_a_loop() -> None:
    Adder.deploy(1)

    async def go() -> int:
        handle = Adder.get_handle(sync=False)
        assert serve.get_deployment("Adder").get_handle(sync=False) == handle
        return await (await handle.remote(1))

    assert asyncio.run(go()) == 2


def test_deployments_are_listed_and_found_by_name() -> None:
    Adder.deploy(1)

    assert serve.list_deployments() == {"Adder": serve.get_deployment("Adder")}
    assert serve.get_deployment("Adder").get_handle().call(1) == 2

    serve.get_deployment("Adder").delete()

    assert serve.list_deployments() == {}


def test_unknown_deployment_says_what_to_use_for_applications() -> None:
    serve.run(Adder.bind(1), name="app")

    with pytest.raises(DeploymentNotFoundError, match=r"get_deployment_handle\('Adder', app_name\)"):
        serve.get_deployment("Adder")


def test_what_was_found_by_name_cannot_be_deployed_again() -> None:
    Adder.deploy(1)

    with pytest.raises(AttributeError, match=r"D\.options\(num_replicas=2\)\.deploy"):
        serve.get_deployment("Adder").options(num_replicas=2)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        serve.get_deployment("Adder").nothing  # noqa: B018
