"""The secret and the password of the server: in nothing that is printed, logged, stored, sent, or seen in a list of processes."""

import asyncio
import copy
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import millstream
from millstream import runtime, serve
from millstream.broker.connection import open_control
from millstream.broker.link import dial
from millstream.broker.registry import Registry, connect_registry
from millstream.config import Settings, redact
from millstream.dashboard.app import make_app
from millstream.dashboard.feed import Feed
from millstream.dashboard.reading import look
from millstream.errors import BrokerUnavailableError, ConfigError, TaskError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.scenarios.processes import command_line, descendants, wait_for_end
from tests.security.hostile import Enemy
from tests.servers import Server, free_port

PASSWORD, SECRET = "pass-f3b1c9", "secret-77ab02"
ROOT = Path(__file__).parents[2]


def is_clean(text: str | bytes) -> bool:
    """Neither of them, nor the secret as it is kept in memory (and Python prints it)."""
    plain = text if isinstance(text, bytes) else text.encode()
    return not any(word in plain for word in (PASSWORD.encode(), SECRET.encode(), SECRET.encode().hex().encode()))


def whole_text(error: BaseException) -> str:
    """As a traceback shows it, with all local variables: as some collectors of errors do."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "".join(traceback.format_exception(error)) + "".join(
        f"{name}={value}\n"
        for frame in shown.stack
        if "millstream" in frame.filename
        for name, value in (frame.locals or {}).items()
    )


# what is printed


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{PASSWORD}@host:1/0", f"rediss://user:{PASSWORD}@host:1", f"redis://host:1?password={PASSWORD}",
        f"unix://user:{PASSWORD}@/path", f"unix:///path?db=1&password={PASSWORD}", f"redis://user:a@{PASSWORD}@host:1",
        f"redis://host?username=u&PASSWORD={PASSWORD}",
    ],
)  # fmt: skip
def test_url_is_shown_without_its_password(url: str) -> None:
    settings = Settings(url, secret_key=SECRET.encode())

    assert is_clean(redact(url)), redact(url)
    assert is_clean(f"{settings!r} {settings} {[settings]}")
    assert is_clean(repr(copy.copy(settings)))


def test_wrong_urls_are_refused_without_their_password() -> None:
    for url in (
        f"http://u:{PASSWORD}@host",
        f"{PASSWORD}@host",
        f"redis:/{PASSWORD}@host",
        f"host?password={PASSWORD}",
    ):
        with pytest.raises(ConfigError) as caught:
            Settings(url, secret_key=SECRET.encode())
        assert is_clean(str(caught.value)), str(caught.value)


def test_handles_and_engines_say_nothing() -> None:
    settings = Settings(f"redis://:{PASSWORD}@127.0.0.1:1", secret_key=SECRET.encode())
    engines.use(settings)
    try:
        for handle in (DeploymentHandle("Model", "app"), SyncHandle("Model", "app")):
            assert is_clean(repr(handle)) and is_clean(pickle.dumps(handle)) and is_clean(pickle.dumps(handle.method))
        assert is_clean(repr(open_control(settings, "test")))
    finally:
        engines.close_all()


# what goes wrong


async def _connect(settings: Settings) -> None:
    async with open_control(settings, "test") as client:
        await connect_registry(client, settings)


async def _dial(settings: Settings) -> None:
    (await dial(settings, "test")).close()


@pytest.mark.parametrize("connect", [_connect, _dial])
@pytest.mark.parametrize("what", ["wrong password", "wrong host", "wrong port"])
def test_failed_connection_says_neither(
    start_server: Callable[..., Server], connect: Any, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    host = "no-such-host.invalid" if what == "wrong host" else "127.0.0.1"
    port = start_server("--requirepass", "another").port if what == "wrong password" else free_port()
    settings = Settings(f"redis://:{PASSWORD}@{host}:{port}", secret_key=SECRET.encode())

    with pytest.raises(BrokerUnavailableError) as caught:
        asyncio.run(connect(settings))

    assert is_clean(str(caught.value)) and is_clean("".join(traceback.format_exception(caught.value)))
    assert is_clean(caplog.text)
    assert is_clean(whole_text(caught.value))


# a whole installation


@serve.deployment
class Leaky:
    """What a deployment can leave lying about by mistake."""

    async def __call__(self, x: int) -> int:
        return x + 1

    async def boom(self) -> None:
        print("printed", engines.settings())
        raise ValueError(f"with {engines.settings()!r}")


@pytest.fixture
def installation(
    start_server: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[str]:
    """The URL of a server with a password, which `serve.run` will use."""
    url = f"redis://:{PASSWORD}@127.0.0.1:{start_server('--requirepass', PASSWORD).port}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLSTREAM_URL", url)
    monkeypatch.setenv("MILLSTREAM_SECRET_KEY", SECRET)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = descendants(os.getpid())
    yield url
    started = descendants(os.getpid()) - before
    if runtime.is_initialized():
        serve.shutdown()
    millstream.shutdown()
    assert not wait_for_end(started, 20.0)


def everything_in(client: Enemy) -> bytes:
    """All names and values, as they are, of a server."""
    found: list[Any] = []
    for key in client.scan_iter():
        kind = client.type(key)
        match kind:
            case b"string":
                found += [key, client.get(key)]
            case b"hash":
                found += [key, *(part for item in client.hgetall(key).items() for part in item)]
            case b"stream":
                found += [key, repr(client.xrange(key)).encode()]
            case b"list":
                found += [key, *client.lrange(key, 0, -1)]
            case b"zset":
                found += [key, *client.zrange(key, 0, -1)]
    return b"\n".join(found) + repr(client.client_list()).encode()


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "millstream", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.processes
@pytest.mark.any_server
def test_installation_shows_neither_anywhere(
    installation: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    handle = serve.run(Leaky.bind())
    assert handle.call(1) == 2

    with pytest.raises(TaskError) as caught:
        handle.boom.call()
    assert "url='redis://***@" in str(caught.value)
    assert is_clean(str(caught.value)) and is_clean(pickle.dumps(caught.value))
    assert is_clean(whole_text(caught.value))

    lines = [command_line(pid) for pid in descendants(os.getpid())]
    assert any("Leaky" in line or "launcher" in line for line in lines), lines
    assert all(map(is_clean, lines)), lines

    for arguments in (["status", "--json"], ["doctor", "--json"]):
        said = command(*arguments)
        assert said and is_clean(said), said
    wrong = installation.replace(PASSWORD, f"{PASSWORD}-not")
    said = command("status", "--url", wrong)
    assert said and is_clean(said), said

    with redis.Redis.from_url(installation) as client:
        assert is_clean(everything_in(client))

    async def pages() -> str:
        settings = engines.settings()
        async with open_control(settings, "test") as control:
            app = make_app(Feed(settings, partial(look, control, settings)), Registry(control, settings))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8265") as http:
                return "".join([(await http.get(path)).text for path in ("/", "/api/snapshot")])

    assert is_clean(asyncio.run(pages()))
    serve.shutdown()
    out, err = capfd.readouterr()
    assert "printed Settings(" in out, "it is not what the processes print"
    assert is_clean(out) and is_clean(err)
    assert is_clean(caplog.text)
