"""The command line, `millstream`: one module per kind of command, put together here.

Commands import what they need when they run, so that `millstream --help` is quick.
"""

import sys
from typing import NoReturn

import click

from millstream import __version__
from millstream.cli import dead, doctor, operate, processes, requests, run
from millstream.errors import DeployFailedError, MillstreamError, TaskError


class _InOrder(click.Group):
    """Lists its commands in the order they were added: what a newcomer needs comes first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="millstream %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Ray Serve's handle API on nothing but Redis.

    Start with `millstream run MODULE:APP`. The other commands find its server in ./.millstream, or by --url.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@commands.command()
def version() -> None:
    """Print the version."""
    click.echo(f"millstream {__version__}")


for _command in (
    run.run, run.deploy, operate.status, operate.scale, requests.call, requests.ref, dead.dead, doctor.doctor,
    operate.delete, operate.shutdown, processes.launcher, processes.autoscaler, processes.dashboard,
):  # fmt: skip
    commands.add_command(_command)
commands.add_command(commands.commands.pop("version"))  # last


def main() -> NoReturn:
    """Carry out one command line. Mistakes end here, as one line on stderr: exit code 1, or 2 for wrong usage."""
    try:
        code = commands.main(prog_name="millstream", standalone_mode=False)
    except click.Abort:
        code = 130
    except BaseExceptionGroup as group:
        code = _explained(_only_one_of(group))
    except Exception as e:
        code = _explained(e)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _only_one_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one that there is, or the first of several that say the same: the server refused what they asked."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) > 1 and not all(_is_the_servers(one) for one in error.exceptions):
            break
        error = error.exceptions[0]
    return error


def _explained(error: BaseException) -> int:
    """Say what went wrong; the exit code. What is nobody's mistake but ours is raised."""
    match error:
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else "millstream"
            _say(f"{error.format_message()} See `{where} --help`.")
            return 2
        case click.ClickException():
            _say(error.format_message())
            return error.exit_code
        case TaskError():
            click.echo(error.remote_traceback.rstrip(), err=True)
            _say(f"request {error.ref_id} raised {error.cause_type}: {error.args[0]}")
        case DeployFailedError():
            if error.remote_traceback:
                click.echo(error.remote_traceback.rstrip(), err=True)
            _say(str(error).partition("\n")[0])
        case MillstreamError() | TimeoutError():
            _say(str(error))
        case _ if _is_the_servers(error):
            _say(f"the server refused a command: {_as_ours(error)}")
        case _:
            raise error
    return 1


def _is_the_servers(error: BaseException) -> bool:
    from millstream.broker.connection import ANY_TROUBLE

    return isinstance(error, ANY_TROUBLE)


def _as_ours(error: BaseException) -> BaseException:
    from millstream.broker.link import explain

    return explain(error) if isinstance(error, Exception) else error


def _say(text: str) -> None:
    click.echo(f"millstream: {' '.join(text.split())}", err=True)
