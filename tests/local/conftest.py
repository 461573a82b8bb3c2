"""Applications in local mode, and the same on real processes, to compare."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import millstream
from millstream import serve
from tests.scenarios.processes import find, wait_for_end

ROOT = Path(__file__).parents[2]
OURS = ("MILLSTREAM_URL", "MILLSTREAM_SECRET_KEY", "MILLSTREAM_NAMESPACE", "MILLSTREAM_STATE", "MILLSTREAM_LOCAL")


class Mode:
    """One way to serve. Call it as `serve.run`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, app: serve.Application, name: str = "default") -> millstream.SyncHandle:
        return serve.run(app, name=name, local=self.name == "local")

    @property
    def is_local(self) -> bool:
        return self.name == "local"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A directory without a server in it; at the end everything that was started is gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        for name in OURS:
            patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        before = find(os.getpid(), "millstream")
        yield
        started = set(find(os.getpid(), "millstream")).difference(before)
        if millstream.is_initialized():
            serve.shutdown()
        millstream.shutdown()
        left = wait_for_end(started, timeout_s=15.0)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="module", params=["local", "processes"])
def mode(alone: None, request: pytest.FixtureRequest) -> Iterator[Mode]:
    """The same server for all tests of a module, first in one mode, then in the other."""
    yield Mode(request.param)
    serve.shutdown()


@pytest.fixture
def run(mode: Mode) -> Iterator[Mode]:
    """Serve as `serve.run` does, in each mode; what was served is deleted after the test."""
    yield mode
    for name in serve.status().applications:
        serve.delete(name)


@pytest.fixture
def local(alone: None) -> Iterator[Mode]:
    """As `run`, in local mode only, on a server of this test's own."""
    yield Mode("local")
    millstream.shutdown()
