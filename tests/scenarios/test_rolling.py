"""Redeploys and scaling under load: every request gets its answer, whatever comes and goes."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import importlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import millstream
from millstream import serve
from millstream.deployment import Application
from millstream.errors import DeployFailedError, MethodNotFoundError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle
from millstream.runtime import with_registry
from tests.scenarios.load import Load, under_load
from tests.scenarios.processes import wait_for

pytestmark = pytest.mark.processes


def pids(deployment: str) -> set[int]:
    return {replica.pid for replica in serve.status().applications["default"].deployments[deployment].replicas}


def is_healthy(deployment: str) -> bool:
    return serve.status().applications["default"].deployments[deployment].status == "HEALTHY"


def wait_for_health(deployment: str) -> None:
    wait_for(lambda: is_healthy(deployment), 20.0, f"{deployment} to be healthy")


def wait_for_more(load: Load, answers: int = 50) -> None:
    enough = load.so_far() + answers
    wait_for(lambda: load.so_far() >= enough or load.errors, 20.0, "more answers")


def roll(deployment: str, load: Load, deploys: list[Callable[[], object]]) -> None:
    """One deploy after the other; after each of them all replicas are new ones."""
    for deploy in deploys:
        wait_for_more(load)
        before = pids(deployment)
        deploy()
        wait_for_health(deployment)
        assert not before & pids(deployment)
    wait_for_more(load)


def async_model(version: int) -> Application:
    class Model:
        async def __call__(self, x: int) -> tuple[int, int]:
            return version, x

    return serve.deployment(num_replicas=2, max_attempts=1)(Model).bind()


def sync_model(version: int) -> Application:
    class Model:
        def __call__(self, x: int) -> tuple[int, int]:
            return version, x

    return serve.deployment(num_replicas=2, max_ongoing_requests=8, max_attempts=1)(Model).bind()


@pytest.mark.parametrize("model", [async_model, sync_model])
def test_no_request_fails_while_the_code_changes(model: Callable[[int], Application]) -> None:
    serve.run(model(0))
    wait_for_health("Model")

    with under_load("Model") as load:
        roll("Model", load, [lambda version=version: serve.run(model(version)) for version in (1, 2, 3)])  # type: ignore[misc]

    assert {version for version, _ in load.answers} == {0, 1, 2, 3}
    assert len({x for _, x in load.answers}) == len(load.answers)  # each request was answered once, and with its own


def test_no_request_fails_while_a_module_changes_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second look alike to the cache

    def deploy(version: int) -> None:
        (tmp_path / "rolling_model.py").write_text(
            f"class Model:\n    async def __call__(self, x): return {version}, x\n"
        )
        sys.modules.pop("rolling_model", None)
        importlib.invalidate_caches()
        model = importlib.import_module("rolling_model").Model
        serve.run(serve.deployment(num_replicas=2)(model).bind())

    deploy(0)
    wait_for_health("Model")

    with under_load("Model") as load:
        roll("Model", load, [lambda version=version: deploy(version) for version in (1, 2, 3)])  # type: ignore[misc]

    sys.modules.pop("rolling_model", None)
    assert {version for version, _ in load.answers} == {0, 1, 2, 3}


SCRIPT = """
from millstream import serve

VERSION = {version}

@serve.deployment(num_replicas=2)
class Model:
    async def __call__(self, x):
        return VERSION, x

serve.run(Model.bind())
"""


def test_no_request_fails_while_scripts_deploy_what_they_define(tmp_path: Path) -> None:
    serve.start()
    environment = {**os.environ, **engines.settings().to_environment()}

    def deploy(version: int) -> None:
        (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT.format(version=version)))
        subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, check=True, timeout=30)

    deploy(0)
    wait_for_health("Model")

    with under_load("Model") as load:
        roll("Model", load, [lambda version=version: deploy(version) for version in (1, 2, 3)])  # type: ignore[misc]

    assert {version for version, _ in load.answers} == {0, 1, 2, 3}


def test_requests_for_a_method_of_the_next_version_wait_for_it(tmp_path: Path) -> None:
    """Callers of the new version may be up before its replicas are: those of the old one leave their requests alone."""
    ready = tmp_path / "ready"

    def model(version: int) -> Application:
        class Model:
            def __init__(self) -> None:
                while version and not ready.exists():
                    time.sleep(0.01)

            async def __call__(self) -> int:
                return version

        if version:

            async def fresh(self: Any, x: int) -> tuple[int, int]:
                return version, x

            Model.fresh = fresh
        return serve.deployment(num_replicas=2, max_attempts=1)(Model).bind()

    serve.run(model(0))
    handle = serve.get_deployment_handle("Model", sync=True)
    with pytest.raises(MethodNotFoundError, match="available methods: __call__"):
        handle.fresh.call(0)
    wait_for_health("Model")  # a replica that died in the test before may still be on record

    deploying = threading.Thread(target=serve.run, args=[model(1)])
    deploying.start()
    wait_for(lambda: not is_healthy("Model"), what="the deploy")
    refs = [handle.fresh.options(block_until="queued").remote(x) for x in range(20)]
    wait_for(lambda: all(ref.status() == "delayed" for ref in refs), what="all to have been left alone")
    assert handle.call() == 0
    ready.touch()

    assert millstream.get(refs, timeout=30) == [(1, x) for x in range(20)]
    deploying.join(30)
    with pytest.raises(MethodNotFoundError, match="available methods: __call__, fresh"):
        handle.stale.call()


def test_no_request_fails_when_a_redeploy_does() -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no model")

    serve.run(async_model(0))
    wait_for_health("Model")
    before = pids("Model")

    with under_load("Model") as load:
        wait_for_more(load)
        with pytest.raises(DeployFailedError, match="no model"):
            serve.run(serve.deployment(name="Model", num_replicas=2)(Broken).bind())
        wait_for_more(load)
        assert before == {pid for pid in pids("Model") if pid in before}
        roll("Model", load, [lambda: serve.run(async_model(1))])

    assert {version for version, _ in load.answers} == {0, 1}


# the graph


@serve.deployment(num_replicas=2, max_attempts=1)
class Doubler:
    async def __call__(self, x: int) -> int:
        return 2 * x


@serve.deployment(num_replicas=2)
class Tripler:
    async def __call__(self, x: int) -> int:
        return 3 * x


@serve.deployment(num_replicas=2)
class Front:
    """Answers with what it was bound to: nothing, or one or two others, in a chain."""

    def __init__(self, *others: DeploymentHandle) -> None:
        self._others = others

    async def __call__(self, x: int) -> tuple[int, int]:
        value: Any = x
        for other in self._others:
            value = other.remote(value)
        return x, value if isinstance(value, int) else await (await value)


def test_no_request_fails_while_deployments_join_and_leave_the_graph() -> None:
    serve.run(Front.bind())
    wait_for_health("Front")

    with under_load("Front", threads=1, loops=2) as load:
        roll(
            "Front",
            load,
            [
                lambda: serve.run(Front.bind(Doubler.bind())),
                lambda: serve.run(Front.bind(Doubler.bind(), Tripler.bind())),
                lambda: serve.run(Front.bind(Tripler.bind())),
                lambda: serve.run(Front.bind()),
            ],
        )

    assert {answer // x for x, answer in load.answers if x} == {1, 2, 6, 3}
    wait_for(lambda: not leaving(), 10.0, "the others to be gone")
    assert set(serve.status().applications["default"].deployments) == {"Front"}


def leaving() -> dict[str, str]:
    async def read(registry: Any) -> dict[str, str]:
        found: dict[str, str] = (await registry.apps())["default"].leaving
        return found

    return with_registry(read)


# scaling


def test_no_request_fails_while_replicas_come_and_go() -> None:
    serve.run(Doubler.bind())
    wait_for_health("Doubler")

    with under_load("Doubler") as load:
        for count in (4, 1, 3, 2, 1):
            serve.run(Doubler.options(num_replicas=count).bind())
            wait_for(lambda count=count: is_healthy("Doubler") and len(pids("Doubler")) == count, 20.0)  # type: ignore[misc]
            wait_for_more(load)

    assert len(load.answers) > 200


def test_no_request_fails_while_the_config_changes(tmp_path: Path) -> None:
    class Tuned:
        def __init__(self) -> None:
            self._config: Any = None

        def reconfigure(self, config: Any) -> None:
            self._config = config

        async def __call__(self, x: int) -> Any:
            return self._config

    deployment = serve.deployment(num_replicas=3, user_config=0)(Tuned)
    serve.run(deployment.bind())
    wait_for_health("Tuned")
    before = pids("Tuned")

    with under_load("Tuned") as load:
        for config in range(1, 8):
            serve.run(deployment.options(user_config=config).bind())
            wait_for_more(load)

    assert set(load.answers) == set(range(8))
    assert pids("Tuned") == before
    assert millstream.get(serve.get_deployment_handle("Tuned", sync=True).remote(0)) == 7
