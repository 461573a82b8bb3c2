"""The four samples of Ray Serve's page on handles run with their imports changed, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).with_name("samples.py")


@pytest.mark.processes
def test_the_pages_samples_run_with_their_imports_changed(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}

    ran = subprocess.run(
        [sys.executable, str(SAMPLES)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "sync_handle hello",
        "async_handle hello",
        "async_handle_chain hello hello Serve",
        "handle_method ['called', 'method1(hi)']",
    ]


def test_samples_differ_from_ray_code_by_their_imports_only() -> None:
    ours = [line for line in SAMPLES.read_text().splitlines() if "millstream" in line]

    assert ours == ["import millstream as ray", "from millstream import serve"]
