"""Virtual environments for the systems that millstream is compared with: each has one of its own, made once and kept."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def python_of(name: str, packages: tuple[str, ...], cache: Path, needs: tuple[int, int] = (3, 11)) -> str:
    """Its interpreter, with its packages in it; this very one if there are none. LookupError: no Python is new enough."""
    if not packages:
        return sys.executable
    folder = cache / "-".join((name, *packages)).replace("==", "-").replace("[", "-").replace("]", "")
    if not (folder / "ready").exists():
        subprocess.run([_new_enough(needs), "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/pip"), "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return str(folder / "bin/python")


def _new_enough(needs: tuple[int, int]) -> str:
    if sys.version_info[:2] >= needs:
        return sys.executable
    check = f"import sys; sys.exit(sys.version_info[:2] < {needs})"
    for python in _others():
        if subprocess.run([python, "-c", check], check=False, capture_output=True).returncode == 0:
            return python
    raise LookupError(f"it needs Python {needs[0]}.{needs[1]} or newer, and there is none on this machine")


def _others() -> Iterator[str]:
    for minor in range(12, 16):
        if found := shutil.which(f"python3.{minor}"):
            yield found
    yield from (str(python) for python in sorted((Path.home() / ".pyenv/versions").glob("3.*/bin/python")))
