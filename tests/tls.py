"""A server that speaks TLS, and URLs for it. Of the servers of `servers.py`, only Debian's is built with it."""

from dataclasses import dataclass
from pathlib import Path

from tests.certificates import Authority
from tests.cluster import Cluster
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
    tls = ("--tls-port", str(port), *_options(authority))
    return TlsServer(Server(BUILT_WITH_TLS, *tls, *options).start(), authority, port)


def start_tls_cluster(folder: Path) -> tuple[Cluster, str]:
    """Three primaries, and the URL to reach them by TLS."""
    authority = Authority(folder, "authority")
    cluster = Cluster(BUILT_WITH_TLS, replicas=False, tls=_options(authority))
    return cluster, f"{cluster.start().tls_url}?ssl_ca_certs={authority.certificate}"


def _options(authority: Authority) -> tuple[str, ...]:
    pair = authority.sign("server")
    return (
        "--tls-cert-file", str(pair.certificate), "--tls-key-file", str(pair.key),
        "--tls-ca-cert-file", str(authority.certificate), "--tls-auth-clients", "no",
    )  # fmt: skip
