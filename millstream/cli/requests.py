"""Sending one request from the shell, and looking at one."""

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from millstream.cli.options import (
    Server,
    find_deployment,
    for_people,
    json_option,
    note,
    print_json,
    server_options,
    tell,
    whats_missing,
)

if TYPE_CHECKING:
    from millstream.broker.lookup import RequestView
    from millstream.broker.registry import Registry

SHOWN_BYTES = 1_000_000  # of a value; a larger one is not fetched for a look
LOOK_S = 0.1  # while waiting for a request's end


# call


@click.command()
@click.argument("deployment")
@click.argument("args", nargs=-1)
@click.option("--method", default="__call__", help="Method to call; by default the deployment itself.")
@click.option("--kwargs", metavar="JSON", help='Keyword arguments, as {"name": value}.')
@click.option("--timeout", "timeout_s", type=float, help="Give up waiting after so many seconds; the request goes on.")
@json_option
@server_options
def call(
    server: Server,
    deployment: str,
    args: tuple[str, ...],
    method: str,
    kwargs: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Send one request and print its result.

    Each of ARGS is taken as JSON, or as a string where it is none: 3, true, '[1, 2]', '"3"', hello. Write `--` before an
    argument that begins with a dash.
    """
    named = _keyword_arguments(kwargs)

    async def look(registry: "Registry") -> tuple[str, str, list[str]]:
        return *await find_deployment(registry, deployment), await whats_missing(registry)

    app, name, missing = server.ask(look)
    for line in missing:
        note(f"{line}; the request waits for that")
    value = _result_of(server, app, name, method, [_parsed(text) for text in args], named, timeout_s)
    if as_json:
        print_json(value)
    else:
        tell(value if isinstance(value, str) else repr(value))


def _result_of(
    server: Server, app: str, name: str, method: str, args: list[Any], kwargs: dict[str, Any], timeout_s: float | None
) -> Any:
    from millstream import runtime
    from millstream.handles import engines
    from millstream.handles.handle import SyncHandle

    sys.path.insert(0, "")  # values may be of classes that are defined here
    engines.use(server.settings())
    try:
        handle = SyncHandle(name, app).options(method_name=method, block_until="queued")
        ref = handle.remote(*args, **kwargs)
        try:
            return ref.result(timeout_s)
        except KeyboardInterrupt:
            note(f"the request goes on: `millstream ref {ref.id}`")
            raise
        except (ImportError, AttributeError) as e:
            if type(e).__module__ == "builtins":  # not the request's own error, which is a TaskError as well
                raise click.ClickException(_cannot_load(e)) from None
            raise
    finally:
        runtime.shutdown()


def _cannot_load(error: Exception) -> str:
    return f"the value cannot be loaded here: {error}; call from where the application's modules can be imported"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _keyword_arguments(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as e:
        raise click.BadParameter(f"not JSON: {e}.", param_hint="--kwargs") from None
    if not isinstance(found, dict):
        raise click.BadParameter('must be an object, as {"name": value}.', param_hint="--kwargs")
    return found


# ref


@click.command()
@click.argument("ref_id", metavar="ID")
@click.option("--wait", "wait_s", type=float, help="Wait up to so many seconds for the request's end.")
@json_option
@server_options
def ref(server: Server, ref_id: str, wait_s: float | None, as_json: bool) -> None:
    """Show where a request is, and its value.

    Exit code 1 if the ref is unknown, and after `--wait` unless the request has succeeded.
    """
    view, value = server.ask(lambda registry: _look(registry, ref_id, wait_s))
    if as_json:
        print_json({"ref_id": ref_id, "state": "unknown"} if view is None else {**asdict(view), **value})
    elif view is None:
        tell(f"{ref_id}: unknown: it has expired, or never existed on this server")
    else:
        for line in _described(view, value):
            tell(line)
    if view is None or (wait_s is not None and view.state != "succeeded"):
        sys.exit(1)


async def _look(registry: "Registry", ref_id: str, wait_s: float | None) -> "tuple[RequestView | None, dict[str, str]]":
    """The request as it is, at its end if that comes within `wait_s`; with {"value": repr} or {"error": text}, or neither."""
    import anyio

    from millstream.broker.lookup import view_request
    from millstream.broker.states import TERMINAL

    deadline = time.monotonic() + (wait_s or 0.0)
    while True:
        try:
            view = await view_request(registry, ref_id)
        except ValueError as e:
            raise click.ClickException(str(e)) from None
        if view is None or view.state in TERMINAL or time.monotonic() >= deadline:
            break
        await anyio.sleep(min(LOOK_S, max(0.0, deadline - time.monotonic())))
    return view, await _outcome(registry, view) if view is not None else {}


async def _outcome(registry: "Registry", view: "RequestView") -> dict[str, str]:
    """What an ended request left, once its signature is verified."""
    from millstream.broker.codec import codec_for
    from millstream.broker.keys import split_ref
    from millstream.broker.lookup import read_stored
    from millstream.broker.outcomes import open_stored
    from millstream.broker.states import TERMINAL
    from millstream.errors import TaskError

    if view.state not in TERMINAL:
        return {}
    if (view.size_bytes or 0) > SHOWN_BYTES:
        return {"value": f"<{view.size_bytes} bytes>"}
    tag, local = split_ref(view.ref_id)
    codec = codec_for(registry.settings.secret_key, registry.settings.namespace, tag)
    sys.path.insert(0, "")  # the value may be of a class that is defined here
    try:
        return {"value": repr(open_stored(codec, local.encode(), await read_stored(registry, view.ref_id)))}
    except TaskError as e:
        return {"error": f"{e.cause_type}: {e.args[0]}", "traceback": e.remote_traceback}
    except Exception as e:  # SignatureError; an error of ours that ended the request; a class we cannot import
        return {"error" if view.state != "succeeded" else "problem": f"{type(e).__name__}: {e}"}


def _described(view: "RequestView", outcome: dict[str, str]) -> list[str]:
    lines = [f"{view.ref_id}: {_state_in_words(view)}"]
    if view.method:
        lines.append(f"  method    {view.method}")
    if view.entry:
        lines.append(f"  entry     {view.entry} in lane {view.lane}")
    if view.attempt is not None:
        lines.append(f"  attempt   {view.attempt}")
    lines += [f"  attempt {one['attempt']} was on replica {one['replica']}: {one['cause']}" for one in view.history]
    if view.waits_for:
        lines.append(f"  waits for {', '.join(view.waits_for)}")
    lines += [f"  {name:<9} {outcome[name]}" for name in ("value", "error", "problem") if name in outcome]
    if view.expires_in_s is not None:
        lines.append(f"  expires   in {for_people(view.expires_in_s)}")
    return lines


def _state_in_words(view: "RequestView") -> str:
    since = "" if view.since_s is None else f" for {for_people(view.since_s)}"
    match view.state:
        case "running":
            return f"running on replica {view.replica}{since}"
        case "delayed" if view.due_in_s is not None:
            return f"delayed, due in {for_people(view.due_in_s)}"
        case _:
            return f"{view.state}{since}"
