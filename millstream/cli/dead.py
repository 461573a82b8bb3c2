"""Dead letters: requests whose attempts are used up, to be looked at, sent again or dropped."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from millstream.cli.options import (
    Server,
    console,
    counted,
    find_deployment,
    for_people,
    json_option,
    note,
    print_json,
    server_options,
    tell,
)

if TYPE_CHECKING:
    from millstream.broker.dead_letters import DeadLetter
    from millstream.broker.registry import Registry

SHOWN = 50  # in a list, unless asked for more
WHY_NOT = {
    "gone": "was sent again or dropped meanwhile",
    "open": "is not sent again: a request of the same idempotency key is pending",
    "ended": "is not sent again: a request of the same idempotency key has ended since",
    "missing": "cannot be sent again: its large arguments have expired",
    "unusable": "cannot be sent again: it is no request",
}


@click.group()
def dead() -> None:
    """Requests whose attempts are used up: list, show, requeue, drop.

    A request whose replicas keep dying is given up after max_attempts and kept for a week, with its arguments and the
    cause of each death.
    """


def which_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """IDs, or --all, with or without --deployment."""
    for option in (
        click.option("--all", "is_all", is_flag=True, help="All of them, or all of one --deployment."),
        click.option("--deployment", help="Only those of this deployment."),
        click.argument("ids", nargs=-1, metavar="[ID]..."),
    ):
        command = option(command)
    return command


@dead.command("list")
@click.argument("deployment", required=False)
@click.option("--limit", default=SHOWN, show_default=True, type=click.IntRange(1), help="At most so many, the latest.")
@json_option
@server_options
def list_letters(server: Server, deployment: str | None, limit: int, as_json: bool) -> None:
    """List dead letters, the latest first: of all deployments, or of one."""

    async def look(registry: "Registry") -> tuple[list["DeadLetter"], int, int, int]:
        from millstream.broker.dead_letters import letters

        tags = await _tags(registry, deployment)
        found = [letter for tag in tags for letter in await _first(letters(registry, tag), limit)]
        found.sort(key=lambda letter: letter.died_ms, reverse=True)
        total = sum([await registry.dead_count(tag) for tag in tags])
        dropped = sum([await registry.dead_dropped(tag) for tag in tags])
        return found[:limit], total, dropped, await registry.now_ms()

    found, total, dropped, now_ms = server.ask(look)
    if as_json:
        print_json({"dead_letters": [_as_json(letter) for letter in found], "total": total, "dropped": dropped})
        return
    if found:
        _print_table(found, now_ms)
    tell(f"{counted(total, 'dead letter')}{f', {len(found)} shown' if len(found) < total else ''}")
    if dropped:
        note(f"{counted(dropped, 'dead letter')} more fell out of the bounds: a week, and 10,000 per deployment")


@dead.command()
@click.argument("id")
@json_option
@server_options
def show(server: Server, id: str, as_json: bool) -> None:
    """Show one dead letter, by its ref id or its own: the request, and how each of its attempts ended."""
    (letter,) = server.ask(lambda registry: _named(registry, (id,)))
    if as_json:
        print_json(_as_json(letter))
        return
    size = "large arguments" if letter.size_bytes < 0 else f"{letter.size_bytes} bytes of arguments"
    tell(letter.ref_id or letter.id)
    tell(f"  id        {letter.id}")
    tell(f"  method    {letter.method} ({size}, lane {letter.lane or '-'})")
    tell(f"  died      {_utc(letter.died_ms)}")
    for one in letter.history:
        tell(f"  attempt {one['attempt']} was on replica {one['replica']} at {_utc(one['at_ms'])}: {one['cause']}")


@dead.command()
@which_options
@json_option
@server_options
def requeue(server: Server, ids: tuple[str, ...], deployment: str | None, is_all: bool, as_json: bool) -> None:
    """Send dead letters again: the same ref ids and arguments, attempts from 1. IDs are ref ids, or those of `dead list`.

    Whoever reads the ref from then on waits for the new outcome. A deadline the request had does not apply any more.
    Exit code 1 if one of them could not be sent.
    """
    _check_which(ids, deployment, is_all)

    async def send(registry: "Registry") -> dict[str, str]:
        from millstream.broker import dead_letters

        found = await _chosen(registry, ids, deployment)
        answers = await dead_letters.requeue(registry, found)
        return {letter.ref_id or letter.id: answers[letter.id].value for letter in found}

    answers = server.ask(send)
    refused = {name: answer for name, answer in answers.items() if answer != "queued"}
    if as_json:
        print_json({"queued": len(answers) - len(refused), "refused": refused})
    else:
        for name, answer in refused.items():
            note(f"{name} {WHY_NOT[answer]}")
        tell(f"{counted(len(answers) - len(refused), 'request')} sent again")
    if refused:
        sys.exit(1)


@dead.command()
@which_options
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@server_options
def drop(server: Server, ids: tuple[str, ...], deployment: str | None, is_all: bool, yes: bool, as_json: bool) -> None:
    """Forget dead letters, arguments included. IDs are ref ids, or those of `dead list`."""
    _check_which(ids, deployment, is_all)
    if is_all and not yes:
        click.confirm(f"Drop all dead letters{f' of {deployment}' if deployment else ''}?", abort=True, err=True)

    async def forget(registry: "Registry") -> int:
        from millstream.broker import dead_letters

        return await dead_letters.drop(registry, await _chosen(registry, ids, deployment))

    count = server.ask(forget)
    if as_json:
        print_json({"dropped": count})
    else:
        tell(f"{counted(count, 'dead letter')} dropped")


def _check_which(ids: tuple[str, ...], deployment: str | None, is_all: bool) -> None:
    if ids and (is_all or deployment):
        raise click.UsageError("IDs, or --all, not both.")
    if not ids and not is_all:
        raise click.UsageError("Which ones? Give IDs (`millstream dead list` has them), or --all.")


async def _chosen(registry: "Registry", ids: tuple[str, ...], deployment: str | None) -> "list[DeadLetter]":
    from millstream.broker.dead_letters import letters

    if ids:
        return await _named(registry, ids)
    return [letter for tag in await _tags(registry, deployment) async for letter in letters(registry, tag)]


async def _named(registry: "Registry", ids: tuple[str, ...]) -> "list[DeadLetter]":
    """One for each id; a message for the first that is none."""
    from millstream.broker.dead_letters import find

    found = []
    for id in ids:
        try:
            letter = await find(registry, id)
        except ValueError as e:
            raise click.ClickException(str(e)) from None
        if letter is None:
            raise click.ClickException(f"there is no dead letter {id}; `millstream dead list` has those there are")
        found.append(letter)
    return found


async def _tags(registry: "Registry", deployment: str | None) -> list[str]:
    if deployment is not None:
        return [".".join(await find_deployment(registry, deployment))]
    return [tag for app in (await registry.apps()).values() for tag in app.all_tags]


async def _first(found: Any, limit: int) -> "list[DeadLetter]":
    some: list[DeadLetter] = []
    async for letter in found:
        some.append(letter)
        if len(some) == limit:
            break
    return some


def _print_table(found: "list[DeadLetter]", now_ms: int) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=True)
    for title in ("Request", "Method", "Died", "Attempts", "Reason"):
        table.add_column(title, overflow="fold" if title == "Reason" else "ignore", no_wrap=title != "Reason")
    for letter in found:
        ago = f"{for_people(max(0.0, (now_ms - letter.died_ms) / 1000))} ago"
        table.add_row(letter.ref_id or letter.id, letter.method, ago, str(letter.attempt), letter.reason)
    console().print(table)


def _as_json(letter: "DeadLetter") -> dict[str, Any]:
    return {**asdict(letter), "reason": letter.reason}


def _utc(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
