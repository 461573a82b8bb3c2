"""A server that speaks TLS, and URLs for it. Of the servers of `servers.py`, only Debian's is built with it."""

from dataclasses import dataclass
from pathlib import Path

from tests.certificates import Authority
from tests.servers import Server, free_port

BUILT_WITH_TLS = "redis7"


@dataclass(frozen=True, slots=True)
class TlsServer:
    """It also listens without TLS, for the tests' own looks."""

    server: Server
    authority: Authority
    port: int

    def url(self, options: str = "", *, port: int = 0) -> str:
        """`options` go before the file of its authority."""
        return f"rediss://127.0.0.1:{port or self.port}?{options}ssl_ca_certs={self.authority.certificate}"


def start_tls_server(folder: Path, *options: str) -> TlsServer:
    authority, port = Authority(folder, "authority"), free_port()
    pair = authority.sign("server")
    tls = (
        "--tls-port", str(port), "--tls-cert-file", str(pair.certificate), "--tls-key-file", str(pair.key),
        "--tls-ca-cert-file", str(authority.certificate), "--tls-auth-clients", "no",
    )  # fmt: skip
    return TlsServer(Server(BUILT_WITH_TLS, *tls, *options).start(), authority, port)
