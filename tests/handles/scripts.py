"""Python scripts as processes of their own, with what every script of these tests begins with."""

import os
import signal
import subprocess
import sys
import textwrap
import time

from millstream.config import Settings

PRELUDE = """
import asyncio, atexit, gc, logging, os, signal, sys, threading, time, warnings
import millstream
from millstream import serve
logging.getLogger("asyncio").setLevel(logging.ERROR)  # not how long something took on a busy machine
handle = serve.get_deployment_handle("Model", "app")
sync = serve.get_deployment_handle("Model", "app", sync=True)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece: several processes write here

"""


def start_script(
    script: str, settings: Settings | None, path: str = "", *, dev: bool = True
) -> "subprocess.Popen[str]":
    """Start a script, with warnings as errors; from a file where `path` is given. `dev`: Python's development mode."""
    source = PRELUDE + textwrap.dedent(script)
    if path:
        with open(path, "w") as file:
            file.write(source)
    return subprocess.Popen(
        [sys.executable, *(["-X", "dev"] if dev else []), "-W", "error", *([path] if path else ["-c", source])],
        env={**os.environ, **(settings.to_environment() if settings is not None else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(
    script: str,
    settings: Settings | None,
    *,
    path: str = "",
    code: int = 0,
    interrupt: bool = False,
    dev: bool = True,
    timeout_s: float = 40.0,
) -> str:
    """What a script prints. It must end as said, and say nothing on stderr; `interrupt`: Ctrl-C when it says "ready"."""
    with start_script(script, settings, path, dev=dev) as process:
        try:
            begin = ""
            if interrupt:
                assert process.stdout is not None
                begin = process.stdout.readline()
                assert begin == "ready\n"
                time.sleep(0.1)  # until it waits: nobody else can see that
                process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
    assert errors == "" and process.returncode == code, f"exit code {process.returncode}; {errors}"
    return rest
