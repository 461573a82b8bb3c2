"""From MODULE:APP on the command line to the application it names."""

import importlib
import os
import sys
import traceback
from types import ModuleType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from millstream.deployment import Application

OURS = (os.path.dirname(__file__), "<frozen importlib", os.path.dirname(importlib.__file__))


def load_application(target: str) -> "Application":
    """Import MODULE, with the working directory on the path, and take APP from it.

    Raises click.ClickException, in one line; where the module itself fails, after its traceback on stderr.
    """
    module_name, colon, name = target.partition(":")
    if (
        not colon
        or not name
        or module_name.endswith(".py")
        or not all(part.isidentifier() for part in module_name.split("."))
    ):
        raise click.UsageError(f"{target!r} is not MODULE:APP; {_suggestion(target)}.", click.get_current_context())
    module = _import(module_name)
    from millstream.deployment import Application, Deployment

    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise click.ClickException(f"module {module_name!r} has no {name!r}{_alternatives(module)}")
        found = getattr(found, part)
    match found:
        case Application():
            return found
        case Deployment():
            raise click.ClickException(
                f"{target} is a deployment, not yet an application: write .bind(), as in `app = {name}.bind()`, and run that"
            )
        case _:
            raise click.ClickException(
                f"{target} is a {type(found).__name__}, not an application: give what .bind() returned{_alternatives(module)}"
            )


def _suggestion(target: str) -> str:
    path = target.partition(":")[0]
    if path.endswith(".py"):
        dotted = os.path.relpath(path).removesuffix(".py").replace(os.sep, ".").lstrip(".")
        return f"for the file {path} write {dotted}:app"
    return "write, for example, hello:app for `app = Hello.bind()` in hello.py"


def _import(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and (name == e.name or name.startswith(e.name + ".")):
            raise click.ClickException(f"there is no module {e.name!r} in {here} or elsewhere on the path") from None
        raise _failed(name, e) from None
    except (Exception, SystemExit) as e:
        raise _failed(name, e) from None
    _refuse_what_serves_at_import(name)
    return module


def _failed(name: str, error: BaseException) -> click.ClickException:
    """Its traceback goes to stderr from the user's first frame on."""
    formatted = traceback.TracebackException.from_exception(error)
    frames = [frame for frame in formatted.stack if not frame.filename.startswith(OURS)]
    formatted.stack = traceback.StackSummary.from_list(frames)
    click.echo("".join(formatted.format()).rstrip(), err=True)
    return click.ClickException(f"importing {name!r} raised {type(error).__name__}; see above")


def _refuse_what_serves_at_import(name: str) -> None:
    """Replicas import the module as well: each of them would deploy again."""
    from millstream import runtime

    if runtime.owns_processes():
        runtime.shutdown()
        raise click.ClickException(
            f"importing {name!r} called serve.run() or serve.start(): put that under `if __name__ == '__main__':`"
        )


def _alternatives(module: ModuleType) -> str:
    from millstream.deployment import Application

    names = [name for name, value in vars(module).items() if isinstance(value, Application)]
    return f"; its applications are {', '.join(names)}" if names else ""
