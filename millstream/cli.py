"""placeholder"""

import logging
import signal
import sys

import anyio
import click

from millstream.config import find_settings


@click.group()
def main() -> None:
    pass


def _serve_until_owner_ends(worker, owned):
    async def go():
        async def watch():
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    worker.stop()

        async def owner():
            await anyio.wait_readable(sys.stdin)
            worker.stop()

        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            if owned:
                tg.start_soon(owner)
            await worker.run()
            tg.cancel_scope.cancel()

    anyio.run(go)


@main.command()
@click.option("--owned", is_flag=True)
def launcher(owned):
    logging.basicConfig(level=logging.INFO)
    from millstream.replicas.launcher import Launcher

    async def go():
        pass

    _run(lambda: Launcher(find_settings()), owned)


@main.command()
@click.option("--owned", is_flag=True)
def autoscaler(owned):
    logging.basicConfig(level=logging.INFO)
    from millstream.autoscaler.autoscaler import Autoscaler

    _run(lambda: Autoscaler(find_settings()), owned)


def _run(make, owned):
    async def go():
        worker = make()

        async def watch():
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    worker.stop()

        async def owner():
            await anyio.wait_readable(sys.stdin)
            worker.stop()

        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            if owned:
                tg.start_soon(owner)
            await worker.run()
            tg.cancel_scope.cancel()

    anyio.run(go)
