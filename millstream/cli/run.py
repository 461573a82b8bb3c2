"""`millstream run`: everything for one application in one terminal. `millstream deploy`: onto what runs already."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

from millstream.cli.application import load_application
from millstream.cli.options import (
    Server,
    check_name,
    counted,
    note,
    server_options,
    tell,
    verbose_option,
    whats_missing,
)
from millstream.cli.processes import DASHBOARD_PORT, INSTALL_DASHBOARD, has_dashboard, set_up_logging
from millstream.config import read_advert, redact, state_folder
from millstream.errors import BrokerUnavailableError, ConfigError, DeployFailedError

if TYPE_CHECKING:
    from millstream.deployment import Application
    from millstream.tree import Tree

LOOK_S = 0.5  # how soon we notice that our server has ended
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

name_option = click.option("--name", default="default", show_default=True, help="Name of the application.")


@click.command()
@click.argument("target", metavar="MODULE:APP")
@name_option
@click.option("--port", type=click.IntRange(1, 65535), help=f"Port of the dashboard [{DASHBOARD_PORT}].")
@click.option("--no-dashboard", is_flag=True, help="Start no dashboard.")
@verbose_option
@server_options
def run(server: Server, target: str, name: str, port: int | None, no_dashboard: bool, verbose: bool) -> None:
    """Serve an application here, until Ctrl-C.

    Starts what is missing: a server with its data in ./.millstream, a launcher, an autoscaler and the dashboard. What
    was deployed or queued there before goes on; an application of the same name is replaced.
    """
    check_name("application", name)
    set_up_logging(verbose=verbose)
    if verbose:
        os.environ["MILLSTREAM_VERBOSE"] = "1"  # for the processes we start
    application = load_application(target)
    dashboard, address = (None, "") if no_dashboard else _dashboard_port(port)
    _set_title(f"run {target}")
    with _interruptible():
        try:
            _serve(server, application, name, dashboard, address)
        except KeyboardInterrupt:
            _tell_that_we_leave()
            raise
        finally:
            _end(server)


def _serve(server: Server, application: "Application", name: str, dashboard: int | None, address: str) -> None:
    """Start what is missing, deploy, and stay until interrupted."""
    from millstream import runtime, serve

    if server.url:
        runtime.init(server.url, namespace=server.namespace)
    tree = runtime.ensure_running(
        None if server.url else state_folder(server.state), namespace=server.namespace, dashboard=dashboard
    )
    tell(f"server     {_place_of(server, tree)}")
    if address:
        tell(f"dashboard  {address}")
    try:
        serve.run(application, name=name, local=False)
    except DeployFailedError as e:
        if tree is not None and tree.has("launcher"):  # whose log has shown the traceback
            raise click.ClickException(str(e).partition("\n")[0]) from None
        raise
    tell(f"serving    {_what_serves(name)}; Ctrl-C ends it")
    _stay(server, tree)


def _place_of(server: Server, tree: "Tree | None") -> str:
    from millstream.handles import engines

    url, folder = redact(engines.settings().url).replace("***@", ""), state_folder(server.state)
    if tree is not None and tree.has_server:
        return f"{url}, data in {folder}"
    return f"{url}, joined the one in {folder}" if _has_joined(server, tree) else url


def _has_joined(server: Server, tree: "Tree | None") -> bool:
    """Do we use the server of the state folder, and another `millstream run` runs it?"""
    from millstream.handles import engines

    advert = read_advert(state_folder(server.state))
    return (tree is None or not tree.has_server) and advert is not None and advert["url"] == engines.settings().url


def _what_serves(name: str) -> str:
    from millstream import serve

    status = serve.status().applications.get(name)
    if status is None:
        return f"{name}, which was deleted at this moment"
    deployments = [
        f"{name}.{deployment} ({counted(one.replica_states.get('RUNNING', 0), 'replica')})"
        for deployment, one in status.deployments.items()
    ]
    waiting = sum(one.waiting for one in status.deployments.values())
    before = f", with {counted(waiting, 'request')} from before" if waiting else ""
    return ", ".join(deployments) + before


def _stay(server: Server, tree: "Tree | None") -> None:
    folder, has_joined = state_folder(server.state), _has_joined(server, tree)
    while True:
        time.sleep(LOOK_S)
        if tree is not None and tree.server_has_ended:
            raise BrokerUnavailableError(f"the server has ended by itself; {folder / 'server.log'} may say why")
        if has_joined and not _has_joined(server, tree):
            raise BrokerUnavailableError("the server has ended with the `millstream run` that started it")


def _tell_that_we_leave() -> None:
    from millstream import runtime

    if not runtime.owns_processes():
        tell("leaving    what is deployed goes on being served")


def _end(server: Server) -> None:
    """End what we have started, in order, and say so."""
    from millstream import runtime

    for one in ENDING:
        signal.signal(one, _leave)
    if runtime.owns_processes():
        kept = "" if server.url else f"; {state_folder(server.state)} keeps the data"
        tell(f"ending     replicas finish what they run{kept}")
    runtime.shutdown()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM and a lost terminal as Ctrl-C, which ends the block in order; a second one leaves at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for one in ENDING:
        signal.signal(one, interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _leave(number: int, frame: FrameType | None) -> None:
    """Our end is the end of what we have started: it drains by itself, within its grace."""
    if number == signal.SIGINT:
        os.write(2, b"millstream: left at once; what is still running ends by itself\n")
        os._exit(130)


def _dashboard_port(wanted: int | None) -> tuple[int | None, str]:
    """The port for the dashboard, None if there can be none; and what to say. An error where a port was asked for."""
    port = wanted or DASHBOARD_PORT
    trouble = ""
    if not has_dashboard():
        trouble = INSTALL_DASHBOARD
    elif not _is_free(port):
        trouble = f"port {port} is taken; choose another with --port"
    if trouble and wanted is not None:
        raise ConfigError(trouble)
    return (None, f"none: {trouble}") if trouble else (port, f"http://127.0.0.1:{port}")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _set_title(text: str) -> None:
    import setproctitle

    setproctitle.setproctitle(f"millstream: {text}")


@click.command()
@click.argument("target", metavar="MODULE:APP")
@name_option
@click.option("--timeout", "timeout_s", type=float, help="Give up waiting after so many seconds; it stays deployed.")
@server_options
def deploy(server: Server, target: str, name: str, timeout_s: float | None) -> None:
    """Deploy an application to what runs already.

    Waits until it serves. Its replicas start where `millstream launcher` runs. An application of the same name is replaced
    while it serves; replicas whose code has not changed stay, and take new options over.
    """
    check_name("application", name)
    set_up_logging(verbose=False)
    application = load_application(target)
    from millstream import runtime, serve

    for line in server.ask(whats_missing):
        note(f"{line}; waiting for that")
    settings = server.settings()
    runtime.init(settings.url, namespace=settings.namespace, secret_key=settings.secret_key)
    try:
        serve.deploy_only(application, name=name, timeout_s=timeout_s)
    except KeyboardInterrupt:
        note(f"application {name!r} stays deployed and comes up by itself; `millstream status` shows how it does")
        sys.exit(130)
    tell(f"serving    {_what_serves(name)}")
