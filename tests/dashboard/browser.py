"""A real headless Chromium, driven over the pipe of its DevTools protocol: pages, scripts in them, screenshots."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
# The protocol is spoken on descriptors 3 and 4. The pipes are first moved out of the way of each other.
PUT_IN_PLACE = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for pipe, number in zip(pipes, (3, 4)):
    os.dup2(pipe, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
END_TIMEOUT_S = 30.0


def find_chromium() -> str:
    """Its path; skips the test where there is none, and fails it in CI."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    if os.environ.get("CI"):
        pytest.fail("no Chromium on this machine; CI must have one")
    pytest.skip("no Chromium on this machine")


class Page:
    """One page of a browser. Blocking: use it from a thread where a loop runs."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer = commands, answers, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask("Page.enable")

    def open(self, url: str) -> None:
        """Load a page and its scripts."""
        answer = self._ask("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        self.wait_for(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def run_before_each_page(self, script: str) -> None:
        """Have it run in every page opened from now on, before the page's own scripts."""
        self._ask("Page.addScriptToEvaluateOnNewDocument", source=script)

    def wait_for(self, script: str, timeout_s: float = 10.0) -> Any:
        """Return as soon as the expression is true; fails the test if it does not become so."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s:g} s in vain for {script}; the page says:\n{self.text}")
            time.sleep(0.05)
        return value

    @property
    def text(self) -> str:
        """What a reader sees."""
        return str(self.run("document.body?.innerText"))

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if is_phone else 1, mobile=is_phone,
        )  # fmt: skip

    def set_scheme(self, scheme: str) -> None:
        """`light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str) -> None:
        """One key, where the focus is: `Tab` or `Enter`."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        self._ask("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self._ask("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def save_screenshot(self, path: Path) -> None:
        answer = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _ask(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]

    def _read(self) -> Any:
        while b"\0" not in self._buffer:
            chunk = os.read(self._answers, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def open_browser() -> Iterator[Page]:
    """A browser of our own with an empty profile, and its page. It ends with the block."""
    path, profile = find_chromium(), tempfile.mkdtemp(prefix="ms-chromium-")
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PUT_IN_PLACE, str(to_browser), str(from_browser),
         path, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_browser, from_browser),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)  # the browser ends with its pipe
        os.close(answers)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(profile, ignore_errors=True)
