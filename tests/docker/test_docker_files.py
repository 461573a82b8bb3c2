"""What can be said of docker/ without a container: it names what is there, and servers accept its settings."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Server

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"


def test_image_is_built_of_every_package() -> None:
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()

    copied = re.findall(r"^COPY (\w+) \1$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)

    assert sorted(copied) == sorted(folders)


def test_compose_mounts_and_deploys_what_is_there() -> None:
    compose = (DOCKER / "compose.yml").read_text()

    module, app = re.findall(r'\["deploy", "(\w+):(\w+)"\]', compose)[0]
    assert f"\n{app} = " in (DOCKER / "example" / f"{module}.py").read_text()
    assert all((DOCKER / path).exists() for path in re.findall(r"- (\./[\w./]+):/", compose))


def test_published_ports_are_loopback_only() -> None:
    ports = re.findall(r"ports:\n((?:\s+- .*\n)+)", (DOCKER / "compose.yml").read_text())

    assert ports and all('- "127.0.0.1:' in line for lines in ports for line in lines.splitlines())


@pytest.mark.anyio
@pytest.mark.processes
async def test_servers_accept_the_settings(start_server: Callable[..., Server]) -> None:
    server = start_server("--include", str(DOCKER / "redis.conf"))

    async with server.connect() as client:
        found: Any = await client.config_get("append*", "maxmemory*", "save")

    assert (found["appendonly"], found["appendfsync"], found["save"]) == ("yes", "everysec", "")
    assert (found["maxmemory-policy"], found["maxmemory"]) == ("noeviction", str(1 << 30))
