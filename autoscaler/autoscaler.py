"""The autoscaler's loop: lead, read, decide, put on record, place. One leads; the others stand by.

It holds no state that matters: targets are in Redis, and a new leader starts from them.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import anyio

from millstream.autoscaler.placement import place
from millstream.autoscaler.policy import Memory, decide, is_scaled
from millstream.autoscaler.readings import History, Reading
from millstream.broker import control_scripts
from millstream.broker.connection import (
    ANY_TROUBLE,
    DOWN,
    NO_RIGHT,
    Outage,
    backoff,
    explained,
    open_control,
    run,
    run_all,
)
from millstream.broker.records import DeploymentView, Planned
from millstream.broker.registry import Registry
from millstream.broker.sweeper import Sweeper
from millstream.config import Settings

TICK_S = 1.0  # between looks at deployments that are up; those at zero wake us
LEADER_S = 5.0  # how long a dead leader is waited for
log = logging.getLogger("millstream.autoscaler")


class Autoscaler:
    """`run()` until `stop()`."""

    def __init__(self, settings: Settings) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._client: Any = open_control(settings, f"ms:autoscaler:{self.name}")
        self._run = partial(run, self._client)
        self._registry = Registry(self._client, settings)
        self._sweeper = Sweeper(settings, self._run, self._client.execute_command)
        self._tick_ms = int(min(TICK_S, self._sweeper.lease.look_every_s) * 1000)
        self._histories: dict[str, History] = {}
        self._memories: dict[str, Memory] = {}
        self._last_change = "0-0"
        self._outage = Outage(log)
        self._stop = anyio.Event()

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Work until stopped. Outages of the server are waited out; targets stay as they are."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._work)
            await self._stop.wait()
            tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
            await self._resign()
            await self._client.aclose()

    async def _work(self) -> None:
        delays = backoff()
        while True:
            try:
                views = await self.step()
                self._outage.ended()
                await self._wait_for_something(views)
                delays = backoff()
            except NO_RIGHT:
                raise
            except ANY_TROUBLE as e:
                self._sweeper.connection_was_broken()
                self._histories.clear()
                self._outage.began(e)
                await anyio.sleep(next(delays))

    async def step(self) -> list[DeploymentView]:
        """One pass: decide for every deployment if we lead. Returns what it saw."""
        fence = await self._run(control_scripts.lead(self._registry.keys, self.name, LEADER_S))
        records = await self._registry.apps()
        if fence and any(record.leaving for record in records.values()):
            await self._registry.retire()
            records = await self._registry.apps()
        views = await self._registry.views(with_leaving=True, records=records)
        if fence:
            for view in views:
                await self._decide(view, fence)
            await self._place(views)
        await self._sweeper.step_all([view.tag for view in views], partial(run_all, self._client))
        return views

    async def _decide(self, view: DeploymentView, fence: int) -> None:
        """Decide one deployment's target; what changed goes on record with its inputs."""
        reading = Reading(
            time.monotonic(),
            view.backlog,
            running=sum(r.state == "RUNNING" for r in view.replicas),
            starting=sum(r.state == "STARTING" for r in view.replicas),
        )
        history = self._histories.setdefault(view.tag, History())
        history.add(reading)
        present = view.target if view.has_target else None
        memory = self._memories.get(view.tag, Memory(wanted=((reading.at_s, present or 0),)))
        decision = decide(view.config, view.override, present, reading, history.rates(), memory, list(history.readings))
        self._memories[view.tag] = decision.memory
        if decision.target != present:
            record = {"was": present if present is not None else "", "by": self.name, **decision.inputs}
            keys = self._registry.keys_of(view.tag)
            if (
                await self._run(control_scripts.decide(keys, fence, decision.target, decision.reason, record))
                == "decided"
            ):
                view.target, view.has_target = decision.target, True
                log.info("%s: %s -> %d replicas: %s", view.tag, present, decision.target, decision.reason)

    async def _place(self, views: list[DeploymentView]) -> None:
        """Write each node's plan where it differs from what it should be."""
        nodes = sorted(await self._registry.nodes())
        plans = {node: await self._registry.plan(node) for node in nodes}
        load = {node: sum(planned.replicas for planned in plan.values()) for node, plan in plans.items()}
        new: dict[str, dict[str, Planned]] = {node: {} for node in nodes}
        for view in views:
            now = {node: plan[view.tag].replicas for node, plan in plans.items() if view.tag in plan}
            for node, count in place(view.target if view.has_target else 0, nodes, now, load).items():
                load[node] += count - now.get(node, 0)
                planned = Planned(count, view.version, view.revision)
                if plans[node].get(view.tag) != planned:
                    new[node][view.tag] = planned
        for node, changed in new.items():
            if changed:
                await self._registry.assign(node, changed)
        deployed = {view.tag for view in views}
        for node, plan in plans.items():
            for tag in plan.keys() - deployed - self._unreadable(plan):
                await self._registry.unassign(node, tag)
        for tag in (self._histories.keys() | self._memories.keys()) - deployed:
            self._histories.pop(tag, None)
            self._memories.pop(tag, None)

    def _unreadable(self, tags: Iterable[str]) -> set[str]:
        """Those whose records some other program has written over: what runs of them stays as it is."""
        unreadable = self._registry.unreadable
        return {tag for tag in tags if tag in unreadable or tag.partition(".")[0] in unreadable}

    async def _wait_for_something(self, views: list[DeploymentView]) -> None:
        """Until the next tick, a change of what is deployed, or the first request of a deployment at zero."""
        streams = {self._registry.keys.changes: self._last_change}
        for view in views:
            if view.target == 0 and is_scaled(view.config, view.override):
                lanes = self._registry.keys_of(view.tag).lanes
                streams.update(zip(lanes, view.backlog.last_ids, strict=True))
        with explained():
            added = await self._client.xread(streams, block=self._tick_ms)
        for name, entries in added or ():
            if name.decode() == self._registry.keys.changes:
                self._last_change = entries[-1][0].decode()

    async def _resign(self) -> None:
        try:
            if (await self._client.get(self._registry.keys.leader) or b"").startswith(self.name.encode()):
                await self._client.delete(self._registry.keys.leader)
        except DOWN:
            pass  # the lease ends by itself
