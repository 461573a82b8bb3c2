"""A launcher's place in the cluster: the record of its node, and the leases of the node and its replicas."""

import asyncio
import os
import socket
from collections.abc import Iterable

from millstream.broker import control_scripts
from millstream.broker.call import Call
from millstream.broker.connection import run_all
from millstream.broker.records import NodeRecord, ReplicaRecord
from millstream.broker.registry import Registry
from millstream.broker.supplying import Run
from millstream.errors import BrokerUnavailableError
from millstream.replicas.process import ReplicaProcess


class Membership:
    """Every method may be repeated, and raises what a lost connection does."""

    def __init__(self, registry: Registry, run: Run, node: str, ttl_s: float) -> None:
        self._registry, self._run, self._node, self._ttl_s = registry, run, node, ttl_s
        self._record = ""  # as it is stored

    async def join(self) -> None:
        record = NodeRecord(self._node, socket.gethostname(), os.getpid(), await self._registry.now_ms())
        self._record = self._registry.signer.write(record, self._node)
        await self.renew(())
        await self._registry.announce(f"node {self._node} is up")

    async def renew(self, replicas: Iterable[ReplicaProcess]) -> None:
        """The leases of the node and its replicas; the node's record with it, in case the server has lost it."""
        by_tag: dict[str, list[str]] = {}
        for process in replicas:
            by_tag.setdefault(process.tag, []).append(process.replica)
        calls = [self._lease_of([self._registry.keys.node_lease(self._node)])]
        if self._record:
            calls.append(control_scripts.enlist(self._registry.keys.nodes, self._node, self._record))
        calls += [self._replica_leases(tag, names) for tag, names in by_tag.items()]
        if self._registry.settings.is_cluster:
            ends = await asyncio.gather(*map(self._in_time, calls), return_exceptions=True)
        else:
            ends = [*await run_all(self._registry.client, calls)]
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _in_time(self, call: Call[int]) -> int:
        """Leases on other nodes of the cluster must not expire while one does not answer."""
        try:
            async with asyncio.timeout(self._ttl_s / 3):
                done: int = await self._run(call)
                return done
        except TimeoutError as e:
            raise BrokerUnavailableError("a node of the cluster does not answer") from e

    async def lease(self, tag: str, *replicas: str) -> None:
        """Replicas of one deployment live, for a while."""
        await self._run(self._replica_leases(tag, replicas))

    def _replica_leases(self, tag: str, replicas: Iterable[str]) -> Call[int]:
        keys = self._registry.keys_of(tag)
        return self._lease_of([keys.lease(replica) for replica in replicas])

    def _lease_of(self, leases: list[str]) -> Call[int]:
        return control_scripts.renew(leases, self._ttl_s, self._node)

    async def enlist(self, process: ReplicaProcess) -> None:
        """A replica was started; what it says of itself goes before this."""
        now_ms = await self._registry.now_ms()
        record = ReplicaRecord(process.replica, self._node, process.pid, process.version, "STARTING", now_ms)
        listed = self._registry.keys_of(process.tag).replicas
        text = self._registry.signer.write(record, process.tag, process.replica)
        await self._run(control_scripts.enlist(listed, process.replica, text, only_if_new=True))

    async def strike(self, process: ReplicaProcess) -> None:
        """A replica is no more."""
        await self._registry.client.hdel(self._registry.keys_of(process.tag).replicas, process.replica)

    async def leave(self) -> None:
        """Take the node off the list."""
        keys, client = self._registry.keys, self._registry.client
        await client.hdel(keys.nodes, self._node)
        await client.delete(keys.node_lease(self._node))  # one by one: in a cluster they are on different nodes
        await client.delete(keys.node_plan(self._node))
        await self._registry.announce(f"node {self._node} is leaving")
