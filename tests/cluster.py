"""A Redis Cluster of plain server processes on loopback ports: three primaries, and a replica of each if wanted."""

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import redis
import redis.exceptions
from redis.crc import key_slot

from millstream.config import Settings
from tests.cluster_clients import WholeCluster, open_blocking
from tests.servers import Server, free_port

NODE_TIMEOUT_MS = 1000
SLOTS = 16384
PATIENCE_S = 30.0


class Cluster:
    """`stop` ends it for good. `nodes` are the three primaries that it begins with, then their replicas.

    With `tls`, options for it, each node has a port that speaks it, too, and they speak it with each other.
    """

    def __init__(
        self, name: str, *options: str, primaries: int = 3, replicas: bool = True, tls: Sequence[str] = ()
    ) -> None:
        self.name = name
        cluster = (
            "--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-config-file", "nodes",
            "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1",
        )  # fmt: skip
        nodes = 2 * primaries if replicas else primaries
        self._bus_ports = [free_port() for _ in range(nodes)]  # by default 10,000 above, which may be too high
        self.tls_ports = [free_port() for _ in range(nodes)] if tls else []
        self.nodes = [Server(name, *cluster, "--cluster-port", str(port), *options) for port in self._bus_ports]
        for node, port in zip(self.nodes, self.tls_ports, strict=False):
            node.options += ("--tls-port", str(port), "--tls-cluster", "yes", *tls)
        self._primaries = primaries
        self._failed: set[Server] = set()

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[: self._primaries])

    @property
    def tls_url(self) -> str:
        return "rediss+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self.tls_ports[: self._primaries])

    def start(self) -> "Cluster":
        for node in self.nodes:
            node.start()
        ports = self.tls_ports or [node.port for node in self.nodes]
        for port, bus_port in zip(ports[1:], self._bus_ports[1:], strict=True):
            self._ask(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", port, bus_port)
        share = -(-SLOTS // self._primaries)
        for number, node in enumerate(self.nodes[: self._primaries]):
            self._ask(node, "CLUSTER", "ADDSLOTSRANGE", number * share, min(SLOTS, (number + 1) * share) - 1)
        wait_for(lambda: all(len(self._known(node)) == len(self.nodes) for node in self.nodes), "all to know of all")
        for number, node in enumerate(self.nodes[self._primaries :]):
            primary_id = self._ask(self.nodes[number], "CLUSTER", "MYID").decode()
            wait_for(partial(self._follows, node, primary_id), "a replica to follow")
        wait_for(lambda: all(self._is_well(node) for node in self.nodes), "the cluster to be well")
        return self

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def connect(self, client_name: str = "test") -> WholeCluster:
        return WholeCluster(Settings(self.url), client_name)

    def connect_blocking(self) -> Any:
        return open_blocking(self.url)

    def primary_of(self, key: str) -> Server:
        """The process that has this key now, as one that lives knows."""
        alive = self._alive[0]
        slot = int(self._ask(alive, "CLUSTER", "KEYSLOT", key))
        for first, last, primary, *_ in self._ask(alive, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == primary[1])
        raise AssertionError(f"nobody has {key}")

    def wait_for_replicas(self) -> None:
        """Return when all that has been written until now is with the replicas, too."""
        for node in self._alive:
            info = self._ask_raw(node, "INFO", "replication")
            if b"role:master" in info:
                wanted = int(re.findall(rb"master_repl_offset:(\d+)", info)[0])
                wait_for(partial(self._has_replicated, node, wanted), "the replica to catch up")

    def _has_replicated(self, node: Server, offset: int) -> bool:
        offsets = re.findall(rb"slave\d+:.*offset=(\d+)", self._ask_raw(node, "INFO", "replication"))
        return min(map(int, offsets), default=0) >= offset

    def move(self, key: str) -> None:
        """Move the slot of this key, with all that is in it, from its primary to another one."""
        source = self.primary_of(key)
        target = next(node for node in self.nodes[: self._primaries] if node is not source)
        slot = int(self._ask(source, "CLUSTER", "KEYSLOT", key))
        ids = {node: self._ask(node, "CLUSTER", "MYID").decode() for node in (source, target)}
        self._ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        self._ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        while keys := self._ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 10):
            self._ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            self._ask(node, "CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        wait_for(lambda: self.primary_of(key) is target, "all to know of the move")

    def flush(self) -> None:
        for node in self._alive:
            with contextlib.suppress(redis.exceptions.ReadOnlyError):
                self._ask(node, "FLUSHALL")

    def fail(self, node: Server, how: str) -> None:
        """Kill a node, or freeze it."""
        self._failed.add(node)
        node.kill() if how == "kill" else node.freeze()

    def thaw(self, node: Server) -> None:
        """Let a frozen primary go on, and return when it follows the one that took its place."""
        node.thaw()
        self._failed.discard(node)
        wait_for(lambda: b"master_link_status:up" in self._ask_raw(node, "INFO", "replication"), "it to follow")
        wait_for(lambda: all(self._is_well(one) for one in self._alive), "the cluster to be well")

    @property
    def _alive(self) -> list[Server]:
        return [node for node in self.nodes if node not in self._failed]

    def _known(self, node: Server) -> list[bytes]:
        return [row for row in self._ask_raw(node, "CLUSTER", "NODES").splitlines() if b"handshake" not in row]

    def _follows(self, node: Server, primary_id: str) -> bool:
        with contextlib.suppress(redis.exceptions.ResponseError):  # it has not heard of that one yet
            self._ask(node, "CLUSTER", "REPLICATE", primary_id)
        return b"master_link_status:up" in self._ask_raw(node, "INFO", "replication")

    def _is_well(self, node: Server) -> bool:
        info = self._ask_raw(node, "CLUSTER", "INFO")
        return b"cluster_state:ok" in info and b"cluster_slots_ok:16384" in info

    def _ask(self, node: Server, *command: Any) -> Any:
        with redis.Redis(port=node.port, protocol=2) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def _ask_raw(self, node: Server, *command: Any) -> bytes:
        answer: bytes = self._ask(node, *command)
        return answer


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s in vain for {what}"
        time.sleep(0.02)


def names_on_each(primaries: int = 3, app: str = "default", namespace: str = "ms") -> list[str]:
    """Names of deployments, each of whose keys are with another primary of a cluster that has just been started."""
    share, found = -(-SLOTS // primaries), dict[int, str]()
    for number in itertools.count():
        name = f"Part{number}"
        found.setdefault(key_slot(f"{namespace}:{app}.{name}".encode()) // share, name)
        if len(found) == primaries:
            return [found[number] for number in range(primaries)]
    raise AssertionError("there is no end to numbers")
