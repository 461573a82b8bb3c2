"""What the commands share: which server, how to read from it, and how to print."""

import contextlib
import functools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from millstream.config import Settings, find_settings, read_advert, state_folder
from millstream.errors import BrokerUnavailableError, ConfigError, DeploymentNotFoundError

if TYPE_CHECKING:
    from rich.console import Console

    from millstream.broker.records import AppRecord, DeploymentView
    from millstream.broker.registry import Registry

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, envvar="MILLSTREAM_VERBOSE", help="Log changes of state, not only trouble."
)


@dataclass(frozen=True, slots=True)
class Server:
    """The server a command speaks with, as the command line and the environment name it."""

    url: str | None
    namespace: str | None
    state: str | None

    def settings(self) -> Settings:
        """Raises BrokerUnavailableError where none is named, or the one of the state folder has ended; ConfigError."""
        if not self.url:
            self._expect_an_embedded_one()
        return find_settings(self.url, namespace=self.namespace, state=self.state)

    def _expect_an_embedded_one(self) -> None:
        from millstream import embedded

        folder = state_folder(self.state)
        if read_advert(folder) is None:
            raise BrokerUnavailableError(
                f"no server to talk to: none runs in {folder}; "
                "start one with `millstream run MODULE:APP`, give --url, or set MILLSTREAM_URL"
            )
        if not embedded.is_running(folder):
            raise BrokerUnavailableError(
                f"the server in {folder} does not run any more; start it again with `millstream run MODULE:APP`"
            )

    def ask(self, work: "Callable[[Registry], Awaitable[T]]") -> T:
        """Run `work` on a registry of this server. BrokerUnavailableError, SignatureError, and what `work` raises."""
        import asyncio

        settings = self.settings()

        async def go() -> T:
            from millstream.broker.connection import explained, open_control
            from millstream.broker.registry import connect_registry

            client = open_control(settings, "ms:cli")
            try:
                with explained():
                    return await work(await connect_registry(client, settings, only_look=True))
            finally:
                await client.aclose()

        return asyncio.run(go())


def server_options(command: F) -> F:
    """--url, --namespace and --state, given to the command as its first argument, a `Server`."""

    @functools.wraps(command)
    def with_server(*args: Any, url: str | None, namespace: str | None, state: str | None, **options: Any) -> Any:
        return command(Server(url, namespace, state), *args, **options)

    for option in (
        click.option("--state", envvar="MILLSTREAM_STATE", metavar="DIR", help="Folder of the embedded server [.millstream]."),
        click.option("--namespace", envvar="MILLSTREAM_NAMESPACE", help="Part of the server to use [ms]."),
        click.option("--url", envvar="MILLSTREAM_URL", help="redis://host:port, rediss://, unix:// or redis+cluster://; wins over --state."),
    ):  # fmt: skip
        with_server = option(with_server)
    return with_server  # type: ignore[return-value]


# reading


async def find_deployment(registry: "Registry", text: str) -> tuple[str, str]:
    """(application, deployment) for `app.name`, or for `name` where only one application has it."""
    apps = await registry.apps()
    known = [(app.name, name) for app in apps.values() for name in app.deployments]
    found = [(app, name) for app, name in known if text in (name, f"{app}.{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise click.ClickException(f"{text!r} is in several applications: say {_listed(found, 'or')}")
    deployed = f"deployed are {_listed(known, 'and')}" if known else "nothing is deployed"
    raise DeploymentNotFoundError(f"there is no deployment {text!r}; {deployed}", deployment=text)


def _listed(pairs: list[tuple[str, str]], word: str) -> str:
    names = [f"{app}.{name}" for app, name in pairs]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def check_name(kind: str, name: str) -> None:
    """ConfigError for what cannot be part of a key: said before anything is started."""
    from millstream.broker import keys

    try:
        keys.check_name(kind, name)
    except ValueError as e:
        raise ConfigError(str(e)) from None


async def find_app(registry: "Registry", name: str) -> "AppRecord":
    apps = await registry.apps()
    if name not in apps:
        deployed = f"deployed are {', '.join(apps)}" if apps else "nothing is deployed"
        raise DeploymentNotFoundError(f"there is no application {name!r}; {deployed}", app=name)
    return apps[name]


async def whats_missing(registry: "Registry") -> list[str]:
    """One line for each process without which nothing is served, and how to start it."""
    lines = []
    if not await registry.nodes():
        lines.append("no launcher runs on this server: start one with `millstream launcher`")
    if not await registry.client.exists(registry.keys.leader):
        lines.append("no autoscaler runs on this server: start one with `millstream autoscaler`")
    return lines


def reason_for_replicas(view: "DeploymentView") -> str:
    """Why a deployment has as many replicas as it has: an operator's word, or the last decision."""
    override = view.override or {}
    if "num_replicas" in override:
        return f"an operator set {counted(override['num_replicas'], 'replica')}"
    if override:
        return f"{view.reason} (an operator set {override['min_replicas']} to {override['max_replicas']})"
    return view.reason


# printing


def tell(text: str) -> None:
    """One line on stdout, at once; a terminal that has gone is no reason to fail."""
    with contextlib.suppress(OSError):
        click.echo(text)


def note(text: str) -> None:
    """One line on stderr beside the answer."""
    click.echo(f"millstream: {text}", err=True)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def console() -> "Console":
    """For tables: as wide as the terminal, and wide enough for long names where there is none."""
    from rich.console import Console

    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=200)


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def for_people(seconds: float) -> str:
    """A length of time in the unit a person would choose."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
