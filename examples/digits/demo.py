"""A day of traffic in half a minute: replicas go from zero to several and back, and nothing is left behind.

`make demo`, or `python -m examples.digits [--requests 3000] [--seconds 30]`.
"""

import argparse
import asyncio
import signal
import time
from collections.abc import Iterable

import millstream
from examples.digits.app import app
from examples.digits.day import Day, arrivals_s
from examples.digits.images import Image, scan_all
from examples.digits.screen import Screen
from millstream import DeploymentHandle, serve

NAME = "digits"
LOOK_EVERY_S = 0.25
PATIENCE_S = 60.0  # for the way back to zero; it takes some 15 s


def main() -> None:
    options = parse_arguments()
    screen = Screen()
    try:
        screen.say("starting what is missing: a Redis server, a launcher, an autoscaler")
        serve.run(app, name=NAME)
        day = asyncio.run(play(options.requests, options.seconds, screen))
        screen.summarise(day)
    except KeyboardInterrupt:
        screen.say("interrupted")
        raise
    finally:
        screen.say("stopping what was started")
        stop()


def stop() -> None:
    """Take the application down and end what was started. A second Ctrl-C does not cut this short."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if millstream.is_initialized():
            serve.delete(NAME)
    finally:
        millstream.shutdown()


async def play(requests: int, seconds: float, screen: Screen) -> Day:
    """Send all requests over `seconds`, watching; then watch until the last replica is gone."""
    handle = await asyncio.to_thread(serve.get_app_handle, NAME)
    day = Day(requests, seconds)
    with screen.live():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch(day, screen))
            await send(handle, zip(arrivals_s(requests, seconds), scan_all(requests), strict=True), day)
    return day


async def send(handle: DeploymentHandle, scans: Iterable[tuple[float, tuple[Image, int]]], day: Day) -> None:
    """Send each scan when its time has come. Nobody waits for the answers to others, as in real life."""
    async with asyncio.TaskGroup() as requests:
        for at_s, (scan, digit) in scans:
            await asyncio.sleep(max(0.0, at_s - day.now_s()))
            requests.create_task(ask(handle, scan, digit, day))


async def ask(handle: DeploymentHandle, scan: Image, digit: int, day: Day) -> None:
    sent_s = time.perf_counter()
    answer = await handle.call(scan)
    day.answer(time.perf_counter() - sent_s, is_correct=answer == digit)


async def watch(day: Day, screen: Screen) -> None:
    """Look at the application a few times a second, until it has gone back to zero."""
    while not day.is_over:
        status = await asyncio.to_thread(serve.status)
        day.look(status.applications[NAME])
        screen.show(day)
        if day.answered == day.requests and day.now_s() > day.answered_at_s + PATIENCE_S:
            return
        await asyncio.sleep(LOOK_EVERY_S)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--requests", type=int, default=3000, metavar="N", help="how many images to send (default 3000)"
    )
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="over how long (default 30)")
    return parser.parse_args()
