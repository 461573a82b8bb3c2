"""Applications in local mode: what is tested here is what code sees that was written for Ray."""

from collections.abc import Callable, Iterator

import pytest

import millstream
from millstream import serve
from tests.local.conftest import alone  # noqa: F401 - a fixture

Run = Callable[..., millstream.SyncHandle]


@pytest.fixture(scope="module")
def _one_server(alone: None) -> Iterator[None]:  # noqa: F811
    yield
    serve.shutdown()


@pytest.fixture
def run(_one_server: None) -> Iterator[Run]:
    """`serve.run` in local mode; what was served is deleted after the test."""

    def run(app: serve.Application, **options: object) -> millstream.SyncHandle:
        return serve.run(app, local=True, **options)  # type: ignore[arg-type]

    serve.start(local=True)
    yield run
    for name in serve.status().applications if millstream.is_initialized() else ():
        serve.delete(name)
