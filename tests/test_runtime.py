"""The composition root starts what is missing, once."""

import subprocess

import pytest

from tests.cli.shell import MILLSTREAM, Shell

pytestmark = pytest.mark.processes

STARTS_TWICE = """
from millstream import serve
from tests.scenarios.processes import find, me

serve.start()
serve.start()
print(*[len(find(me(), f"millstream {name}")) for name in ("launcher", "autoscaler")])
serve.shutdown()
"""


def test_started_twice_is_started_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    shell = Shell(tmp_path_factory.mktemp("twice"))

    said = subprocess.run(
        (MILLSTREAM[0], "-c", STARTS_TWICE),
        check=False,
        cwd=shell.folder,
        env=shell.environment,
        capture_output=True,
        text=True,
    )

    assert said.stdout.split() == ["1", "1"], said.stderr
    assert list(shell.close()) == []
