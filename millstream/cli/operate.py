"""The operator's commands: what is deployed and how it does, how many replicas, and the end of it."""

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from millstream.cli.options import (
    Server,
    console,
    counted,
    find_app,
    find_deployment,
    for_people,
    json_option,
    note,
    print_json,
    reason_for_replicas,
    server_options,
    tell,
    whats_missing,
)
from millstream.errors import ConfigError

if TYPE_CHECKING:
    from millstream.broker.records import AppRecord, DeploymentView, NodeRecord
    from millstream.broker.registry import Registry

REPLICAS_SHOWN = 30  # in the table; --json lists all
COLOURS = {"HEALTHY": "green", "DEPLOY_FAILED": "red", "RUNNING": "green"}  # others are on their way: yellow


# status


@click.command()
@json_option
@server_options
def status(server: Server, as_json: bool) -> None:
    """Show applications, deployments and replicas."""

    async def read(registry: "Registry") -> "_Status":
        return _Status(
            apps=await registry.apps(),
            views=await registry.views(),
            nodes=await registry.nodes(),
            missing=await whats_missing(registry),
            now_ms=await registry.now_ms(),
        )

    found = server.ask(read)
    if as_json:
        print_json(found.to_dict())
        return
    if found.views:
        console().print(found.deployments())
    else:
        tell("nothing is deployed")
    if any(view.replicas for view in found.views):
        console().print(found.replicas())
    if found.nodes:
        tell(f"nodes: {', '.join(sorted(found.nodes))}")
    for line in found.missing:
        note(line)


@dataclass(frozen=True, slots=True)
class _Status:
    """One reading, and its faces."""

    apps: "dict[str, AppRecord]"
    views: "list[DeploymentView]"
    nodes: "dict[str, NodeRecord]"
    missing: list[str]
    now_ms: int

    def to_dict(self) -> dict[str, Any]:
        from millstream.status import summarise

        return {
            **summarise(self.apps, self.views).to_dict(),
            "nodes": {name: asdict(record) for name, record in self.nodes.items()},
            "missing": self.missing,
        }

    def deployments(self) -> Any:
        from rich.markup import escape

        table = _table("deployment", "state", "replicas", "waiting", "in flight", "parked", "delayed", "last reason")
        for view in self.views:
            backlog = view.backlog
            table.add_row(
                view.tag,
                _coloured(view.status),
                f"{len(view.running)}/{view.target if view.has_target else '?'}",
                *(str(n) for n in (backlog.waiting, backlog.in_flight, backlog.parked, backlog.delayed)),
                escape(view.failure or view.trouble or reason_for_replicas(view)),
            )
        return table

    def replicas(self) -> Any:
        table = _table("deployment", "replica", "state", "node", "pid", "up")
        rows = [(view, replica) for view in self.views for replica in view.replicas]
        for view, one in rows[:REPLICAS_SHOWN]:
            state = one.state
            if one.version != view.version:
                state += " (old version)"
            elif one.revision != view.revision:
                state += " (old config)"
            up = for_people(max(0, self.now_ms - one.started_ms) / 1000)
            table.add_row(view.tag, one.replica, _coloured(state), one.node, str(one.pid), up)
        if len(rows) > REPLICAS_SHOWN:
            table.add_row("…", f"{len(rows) - REPLICAS_SHOWN} more: see --json")
        return table


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numbers = column in ("replicas", "waiting", "in flight", "parked", "delayed", "pid", "up")
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    return table


def _coloured(state: str) -> str:
    return f"[{COLOURS.get(state, 'yellow')}]{state}[/]"


# scale


@click.command()
@click.argument("deployment")
@click.option("--replicas", type=int, metavar="N", help="Exactly so many.")
@click.option("--min", "least", type=int, metavar="N", help="At least so many; the autoscaler decides.")
@click.option("--max", "most", type=int, metavar="M", help="At most so many; the autoscaler decides.")
@click.option("--auto", is_flag=True, help="As its own configuration says: ends what --replicas, --min and --max set.")
@json_option
@server_options
def scale(
    server: Server,
    deployment: str,
    replicas: int | None,
    least: int | None,
    most: int | None,
    auto: bool,
    as_json: bool,
) -> None:
    """Set how many replicas DEPLOYMENT has.

    This holds, over new versions too, until `--auto`. DEPLOYMENT is app.name, or name where only one application has it.
    """
    if sum((replicas is not None, least is not None or most is not None, auto)) != 1:
        raise click.UsageError("give --replicas, or --min and/or --max, or --auto.", click.get_current_context())

    async def work(registry: "Registry") -> "tuple[DeploymentView, dict[str, Any] | None, list[str]]":
        app, name = await find_deployment(registry, deployment)
        view = await registry.view(app, name)
        if view is None:
            raise click.ClickException(f"deployment {app}.{name} was deleted at this moment")
        wanted = None if auto else _override(view, replicas, least, most)
        await registry.override(view.tag, wanted)
        return view, wanted, await whats_missing(registry)

    view, wanted, missing = server.ask(work)
    if as_json:
        print_json({"deployment": view.tag, "override": wanted, "running": len(view.running), "target": view.target})
    else:
        tell(f"{view.tag}: {_in_words(view, wanted)} ({len(view.running)} running now)")
    for line in missing:
        note(line)


def _override(view: "DeploymentView", replicas: int | None, least: int | None, most: int | None) -> dict[str, Any]:
    """What to store. Both bounds always: they must not contradict the configuration of a later version."""
    if replicas is not None:
        return {"num_replicas": replace(view.config, num_replicas=replicas).num_replicas}  # checked by the config
    scaling = view.config.autoscaling
    if scaling is None:
        raise ConfigError(
            f"{view.tag} has a fixed number of replicas: use --replicas, or give it an autoscaling_config and deploy it again"
        )
    now = {"min_replicas": scaling.min_replicas, "max_replicas": scaling.max_replicas}
    if view.override and "min_replicas" in view.override:
        now = view.override
    wanted: dict[str, Any] = {
        "min_replicas": now["min_replicas"] if least is None else least,
        "max_replicas": now["max_replicas"] if most is None else most,
    }
    replace(scaling, initial_replicas=None, **wanted)  # checks them
    return wanted


def _in_words(view: "DeploymentView", wanted: dict[str, Any] | None) -> str:
    if wanted is None:
        scaling = view.config.autoscaling
        if scaling is None:
            return f"num_replicas={view.config.num_replicas}, as configured"
        return f"{scaling.min_replicas} to {scaling.max_replicas} replicas, as configured"
    if "num_replicas" in wanted:
        return f"{counted(wanted['num_replicas'], 'replica')} from now on"
    return f"{wanted['min_replicas']} to {wanted['max_replicas']} replicas from now on"


# the end


@click.command()
@click.argument("app")
@json_option
@server_options
def delete(server: Server, app: str, as_json: bool) -> None:
    """Delete application APP.

    Its replicas finish what they run; what is queued is dropped.
    """

    async def work(registry: "Registry") -> None:
        await find_app(registry, app)
        await registry.delete(app)

    started = time.monotonic()
    server.ask(work)
    if as_json:
        print_json({"deleted": [app]})
    else:
        tell(f"deleted {app} in {for_people(time.monotonic() - started)}")


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@server_options
def shutdown(server: Server, yes: bool, as_json: bool) -> None:
    """Delete all applications; say what still runs."""
    views = server.ask(lambda registry: registry.views())
    apps = list(server.ask(lambda registry: registry.apps()))
    if apps and not yes and not _is_confirmed(apps, views):
        raise click.ClickException("nothing was deleted; give --yes to delete without being asked")

    async def work(registry: "Registry") -> tuple[list[str], bool]:
        for app in apps:
            await registry.delete(app)
        return sorted(await registry.nodes()), bool(await registry.client.exists(registry.keys.leader))

    nodes, has_autoscaler = server.ask(work)
    if as_json:
        print_json({"deleted": apps, "nodes": nodes, "autoscaler": has_autoscaler})
        return
    tell(f"deleted {', '.join(apps)}" if apps else "nothing was deployed")
    running = [f"the launcher of {node}" for node in nodes] + ["the autoscaler"] * has_autoscaler + ["the server"]
    tell(f"still running: {', '.join(running)}; they end where they were started, by Ctrl-C or SIGTERM")


def _is_confirmed(apps: list[str], views: "list[DeploymentView]") -> bool:
    dropped = sum(v.backlog.waiting + v.backlog.parked + v.backlog.delayed for v in views)
    question = (
        f"Delete {', '.join(apps)}" + (f" and drop {counted(dropped, 'queued request')}" if dropped else "") + "?"
    )
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        return False
