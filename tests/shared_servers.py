"""The servers that all tests of one session share."""

from tests.cluster import Cluster
from tests.servers import CLUSTER, FAKE, AnyServer, FakeServer, Server


class SharedServers:
    """Each is started when the first test asks for it."""

    def __init__(self) -> None:
        self._started: dict[str, AnyServer] = {}

    def get(self, name: str) -> AnyServer:
        if name not in self._started:
            self._started[name] = _start(name)
        return self._started[name]

    def stop(self) -> None:
        for server in self._started.values():
            server.stop()


def _start(name: str) -> AnyServer:
    if name == FAKE:
        return FakeServer()
    if name == CLUSTER:
        return Cluster(name, replicas=False).start()
    return Server(name).start()
