"""Code run in a process of its own, which knows the test's server by its environment."""

import os
import subprocess
import sys
import textwrap

import anyio.to_thread

from millstream.config import Settings


async def run_elsewhere(settings: Settings, code: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Run it to its end, which must be in order."""
    ran = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, *flags, "-c", textwrap.dedent(code)],
            env={**os.environ, **settings.to_environment()},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    )
    assert ran.returncode == 0, ran.stderr
    return ran
