"""`rediss://` over both transports: who is trusted, who is let in, and what is said where it does not work."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from millstream.broker import connection as connection_module
from millstream.broker import link as link_module
from millstream.broker.bulk import Bulk
from millstream.broker.connection import open_control, ping
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import dial
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from tests.broker.raw import Raw
from tests.certificates import Authority
from tests.tls import TlsServer, start_tls_server

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    started = start_tls_server(tmp_path_factory.mktemp("tls"))
    yield started
    started.server.stop()


@pytest.fixture
async def no_hang() -> AsyncIterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 15.0


async def refusal_of_link(url: str) -> str:
    with pytest.raises(BrokerUnavailableError) as caught:
        await dial(Settings(url), "test")
    return str(caught.value)


async def refusal_of_control(url: str) -> str:
    settings = Settings(url)
    async with open_control(settings, "test") as client:
        with pytest.raises(BrokerUnavailableError) as caught:
            await ping(client, settings)
    return str(caught.value)


Refusal = Callable[[str], Awaitable[str]]
REFUSALS = pytest.mark.parametrize("refusal", [refusal_of_link, refusal_of_control])


async def test_both_transports_reach_a_server_whose_authority_they_are_told(tls: TlsServer) -> None:
    settings = Settings(tls.url())

    link = await dial(settings, "test")
    async with open_control(settings, "test") as client:
        await client.set("a", b"x" * 1_000_000, ex=10)
        value = await link.ask("GET", "a")

    assert value == b"x" * 1_000_000
    link.close()


async def test_large_value_goes_there_and_back(tls: TlsServer) -> None:
    bulk, keys = Bulk(Settings(tls.url()), "test", patience_s=1), DeploymentKeys("ms", "app.Model")
    value = b"0123456789" * 500_000

    await bulk.write(keys, keys.value("r" * 22, "-"), Raw(value), 10_000)
    read = await bulk.read(keys.value("r" * 22, "-"), len(value), Raw)

    assert read is not None and bytes(read) == value
    bulk.close()


async def test_certificate_that_is_replaced_counts_from_the_next_connection_on(tmp_path: Path) -> None:
    strict = start_tls_server(tmp_path, "--tls-auth-clients", "yes")
    pair, stranger = strict.authority.sign("client"), Authority(tmp_path, "other").sign("client")
    settings = Settings(strict.url(f"ssl_certfile={pair.certificate}&ssl_keyfile={pair.key}&"))
    (await dial(settings, "test")).close()

    for old, new in ((pair.certificate, stranger.certificate), (pair.key, stranger.key)):
        new.replace(old)

    with pytest.raises(BrokerUnavailableError, match="cannot reach the server"):
        await dial(settings, "test")
    strict.server.stop()


@REFUSALS
async def test_unknown_authority_is_one_clear_error(
    tls: TlsServer, tmp_path: Path, no_hang: None, refusal: Refusal
) -> None:
    other = Authority(tmp_path, "other").certificate

    by_another = await refusal(f"rediss://:hunter2@127.0.0.1:{tls.port}?ssl_ca_certs={other}")
    by_the_systems = await refusal(f"rediss://:hunter2@127.0.0.1:{tls.port}")

    for text in (by_another, by_the_systems):
        assert "CERTIFICATE_VERIFY_FAILED" in text and "ssl_ca_certs" in text
        assert "hunter2" not in text and "\n" not in text


@REFUSALS
async def test_certificate_for_another_host_is_refused(tls: TlsServer, no_hang: None, refusal: Refusal) -> None:
    text = await refusal(f"rediss://localhost:{tls.port}?ssl_ca_certs={tls.authority.certificate}")

    assert "CERTIFICATE_VERIFY_FAILED" in text


async def test_verification_can_be_turned_off_for_both(tls: TlsServer) -> None:
    settings = Settings(f"rediss://localhost:{tls.port}?ssl_cert_reqs=none")

    link = await dial(settings, "test")
    async with open_control(settings, "test") as client:
        await ping(client, settings)

    assert link.is_up
    link.close()


@REFUSALS
async def test_file_that_is_not_there_is_named_as_a_reason(tls: TlsServer, no_hang: None, refusal: Refusal) -> None:
    text = await refusal(f"rediss://127.0.0.1:{tls.port}?ssl_ca_certs=/nowhere/ca.crt")

    assert "No such file" in text


@REFUSALS
async def test_option_that_means_nothing_is_refused(tls: TlsServer, no_hang: None, refusal: Refusal) -> None:
    text = await refusal(tls.url("ssl_cert_reqs=perhaps&"))

    assert "perhaps" in text


@REFUSALS
async def test_port_without_tls_is_an_error_and_not_a_hang(
    tls: TlsServer, no_hang: None, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(connection_module, "PING_TIMEOUT_S", 0.5)

    asked_for_tls = await refusal(tls.url(port=tls.server.port))
    asked_for_none = await refusal(f"redis://127.0.0.1:{tls.port}")

    assert "cannot reach the server" in asked_for_tls
    assert "cannot reach the server" in asked_for_none


@REFUSALS
async def test_server_that_wants_certificates_lets_in_who_has_one(
    tmp_path: Path, no_hang: None, refusal: Refusal
) -> None:
    strict = start_tls_server(tmp_path, "--tls-auth-clients", "yes")
    client = strict.authority.sign("client")
    settings = Settings(strict.url(f"ssl_certfile={client.certificate}&ssl_keyfile={client.key}&"))

    link = await dial(settings, "test")
    async with open_control(settings, "test") as control:
        await ping(control, settings)
    without = await refusal(strict.url())

    assert link.is_up
    assert "cannot reach the server" in without
    link.close()
    strict.server.stop()
