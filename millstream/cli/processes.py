"""The commands that stay: launcher, autoscaler, dashboard. They run until SIGTERM, Ctrl-C or the end of their owner."""

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import click

from millstream.cli.options import Server, check_name, server_options, tell, verbose_option
from millstream.config import Settings
from millstream.errors import ConfigError
from millstream.liveness import may_live

if TYPE_CHECKING:
    from millstream.broker.registry import Registry

DASHBOARD_PORT = 8265  # Ray's, too
INSTALL_DASHBOARD = "the dashboard needs two packages more: pip install 'millstream[dashboard]'"

# Not for people: `millstream run` and serve.run hold the other end of our stdin, and we end with it (millstream/tree.py).
owned_option = click.option("--owned", is_flag=True, hidden=True)


class Component(Protocol):
    async def run(self) -> None: ...
    def stop(self) -> None: ...


@click.command()
@click.option("--node", help="Name of this node; by default the host's name and four characters.")
@verbose_option
@owned_option
@server_options
def launcher(server: Server, node: str | None, verbose: bool, owned: bool) -> None:
    """Run replicas on this host.

    As many as the autoscaler assigns to it. Ends on Ctrl-C or SIGTERM, after its replicas have finished what they run.
    """
    if node is not None:
        check_name("node", node)
    settings = _prepared(server, verbose=verbose, owned=owned)
    if node is not None:
        _check_node(server, node)

    def make() -> Component:
        from millstream.replicas.launcher import Launcher

        component = Launcher(settings, node)
        _begin(f"launcher {component.node}", settings, owned=owned)
        return component

    _run(make, owned=owned, ending="ending: replicas finish what they run (Ctrl-C again leaves them to it)")


@click.command()
@verbose_option
@owned_option
@server_options
def autoscaler(server: Server, verbose: bool, owned: bool) -> None:
    """Decide how many replicas each deployment has.

    Of several autoscalers one decides, and the others stand by.
    """
    settings = _prepared(server, verbose=verbose, owned=owned)

    def make() -> Component:
        from millstream.autoscaler.autoscaler import Autoscaler

        _begin("autoscaler", settings, owned=owned)
        return Autoscaler(settings)

    _run(make, owned=owned)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=DASHBOARD_PORT, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."
)
@verbose_option
@owned_option
@server_options
def dashboard(server: Server, host: str, port: int, verbose: bool, owned: bool) -> None:
    """Show it all on a web page."""
    if not has_dashboard():
        raise click.ClickException(INSTALL_DASHBOARD)
    settings = _prepared(server, verbose=verbose, owned=owned, only_looks=True)

    def make() -> Component:
        _begin("dashboard", settings, owned=owned)
        return _Dashboard(settings, host, port)

    _run(make, owned=owned)


class _Dashboard:
    def __init__(self, settings: Settings, host: str, port: int) -> None:
        import anyio

        self._settings, self._host, self._port = settings, host, port
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        from millstream.dashboard.server import serve

        with self._scope:
            await serve(self._settings, self._host, self._port)

    def stop(self) -> None:
        self._scope.cancel()


def has_dashboard() -> bool:
    return all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn"))


# before


def _prepared(server: Server, *, verbose: bool, owned: bool, only_looks: bool = False) -> Settings:
    """Logging set up, the server and the secret checked. An owned process starts while its server is down, too."""
    set_up_logging(verbose=verbose or not owned)
    if owned or only_looks:  # the dashboard says by itself when the server is away, needs no secret and leaves no mark
        return server.settings()

    async def use(registry: "Registry") -> None:
        await registry.check_secret()  # and leave our mark if we are the first

    server.ask(use)
    from millstream.runtime import warn_about_public_key

    settings = server.settings()
    warn_about_public_key(settings)
    return settings


def set_up_logging(*, verbose: bool) -> None:
    """Short lines on stderr: trouble, and with `verbose` changes of state."""
    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("millstream").setLevel(logging.INFO if verbose else logging.WARNING)


def _check_node(server: Server, node: str) -> None:
    """No other launcher on this host goes by that name."""
    import socket

    here, record = socket.gethostname(), server.ask(lambda registry: registry.nodes()).get(node)
    if record and record.host == here and record.pid != os.getpid() and may_live(here, record.pid):
        raise ConfigError(
            f"node {node!r} has a launcher already (pid {record.pid} on this host); end it, or choose another name"
        )


def _begin(what: str, settings: Settings, *, owned: bool) -> None:
    import setproctitle

    from millstream.config import redact

    setproctitle.setproctitle(f"millstream: {what}")
    if not owned:
        tell(f"millstream: {what} works for {redact(settings.url)}, namespace {settings.namespace}; Ctrl-C ends it")


# while


def _run(make: Callable[[], Component], *, owned: bool, ending: str = "ending") -> None:
    import asyncio

    async def work() -> None:
        loop, component = asyncio.get_running_loop(), make()
        is_told = False

        def stop(number: signal.Signals) -> None:
            nonlocal is_told
            if is_told and number is signal.SIGINT:
                os._exit(130)  # replicas see that their launcher is gone, and end by themselves
            if not is_told and not owned:
                tell(f"millstream: {ending}")
            is_told = True
            component.stop()

        def owner_is_gone() -> None:
            loop.remove_reader(0)
            component.stop()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, stop, number)
        if owned:
            loop.add_reader(0, owner_is_gone)
        await component.run()

    asyncio.run(work())
