"""Applications that are deployed anew while they serve."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from millstream import serve


@serve.deployment(health_check_period_s=3600)
class Tuned:
    """Counts its calls, and tells by which user_config it answers."""

    def __init__(self) -> None:
        self._calls = 0
        self._config: Any = None
        self._inside = 0

    async def reconfigure(self, config: Any) -> None:
        """Does what the config says, so that a test can make it slow, wrong or deadly."""
        if self._inside:
            raise RuntimeError(f"{self._inside} requests are running")
        if config.get("wait_for"):
            Path(config["wait_for"] + ".waiting").touch()  # noqa: ASYNC240
            while not os.path.exists(config["wait_for"]):  # noqa: ASYNC110, ASYNC240 - the test makes it
                await asyncio.sleep(0.005)
        if config.get("die"):
            os._exit(7)
        if config.get("raise") or config.get("raise_in") == os.getpid():
            self._config = "half"
            raise ValueError(config.get("raise"))
        if isinstance(self._config, dict) and self._config.get("is_for_good"):
            raise RuntimeError("there is no way back")
        self._config = config

    async def __call__(self) -> tuple[int, Any, int]:
        self._calls += 1
        return os.getpid(), self._config, self._calls

    async def hold(self, until: str) -> tuple[int, Any]:
        self._inside += 1
        before = self._config
        while not os.path.exists(until):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.005)
        assert before == self._config, "reconfigured while a request was running"
        self._inside -= 1
        return os.getpid(), self._config


@serve.deployment
class TunedInThreads:
    """As `Tuned`, without a coroutine."""

    def __init__(self) -> None:
        self._config: Any = None

    def reconfigure(self, config: Any) -> None:
        time.sleep(config.get("sleep", 0))
        self._config = config

    def __call__(self) -> tuple[int, Any]:
        return os.getpid(), self._config


@serve.deployment
class Patient:
    """As healthy as the files in its folder say; leaves one behind when it goes."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def check_health(self) -> None:
        while (self._folder / "hang").exists():
            time.sleep(0.005)
        if (self._folder / "raise").exists() or (self._folder / f"ill-{os.getpid()}").exists():
            raise OSError("no GPU")

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self, until: str) -> int:
        while not os.path.exists(until):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.005)
        return os.getpid()

    async def __del__(self) -> None:
        await asyncio.sleep(0)
        (self._folder / f"left-{os.getpid()}").touch()
