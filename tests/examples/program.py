"""A program under test: what it has said, and every process that came of it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers import wait_until
from tests.scenarios.processes import descendants, wait_for_end

ROOT = Path(__file__).parents[2]
OF_OURS = ("MILLSTREAM_", "PYTHONPATH", "TMPDIR", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")


class Program:
    """Runs in `folder`, with its temporary files there as well."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self._output = folder / "output"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_OURS)}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), "COLUMNS": "100"}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._family: set[int] = set()

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    async def says(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until `text` is in its output; fail at once if it ends without having said that."""

        def said() -> bool:
            has_ended = self._look()
            assert text in self.output or not has_ended, f"ended without saying {text!r}:\n{self.output}"
            return text in self.output

        await wait_until(said, timeout_s, f"{text!r} in:\n{self.output}")

    async def ends(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; its exit code."""
        await wait_until(self._look, timeout_s, "the program's end")
        assert self.exit_code is not None
        return self.exit_code

    def send(self, number: signal.Signals) -> None:
        self._look()
        self._process.send_signal(number)

    def left_behind(self, timeout_s: float = 2.0) -> set[int]:
        """Those of its processes that still run after `timeout_s`, which is for those that are just ending."""
        return wait_for_end(self._family, timeout_s)

    def kill(self) -> set[int]:
        """End it and all of its processes; the pids of those that had outlived it."""
        outlived = self.left_behind(1.0) if self.exit_code is not None else set()
        self._look()
        for pid in {*self._family, self._process.pid} if self.exit_code is None else outlived:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        return outlived

    def _look(self) -> bool:
        """Note which processes it has now, as they lose their parents later. Has it ended?"""
        self._family |= descendants(self._process.pid)
        return self.exit_code is not None
