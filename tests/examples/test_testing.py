"""The example of how applications are tested: its tests, run as its reader runs them."""

import subprocess
import sys

import pytest

from tests.examples.program import OF_OURS, ROOT


@pytest.mark.processes
def test_tests_of_the_example_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_OURS:
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "millstream.pytest_plugin", "examples/testing"]

    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "7 passed" in ran.stdout
