"""The launcher of one node: starts replicas by the plan in Redis, keeps their leases, sees their deaths at once.

It imports no user code. What a dead replica held is released within milliseconds of its death.
"""

import asyncio
import logging
import os
import random
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskGroup

from millstream.broker import control_scripts
from millstream.broker.connection import ANY_TROUBLE, NO_RIGHT, Outage, backoff, open_control, run, run_all
from millstream.broker.keys import check_name
from millstream.broker.lease import Lease
from millstream.broker.records import Planned
from millstream.broker.registry import Registry
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import Sweeper, bury
from millstream.config import DeploymentConfig, Settings
from millstream.replicas.control import Control
from millstream.replicas.membership import Membership
from millstream.replicas.output import prefix_of, relay
from millstream.replicas.parents import Parents
from millstream.replicas.process import Message, ReplicaProcess, WarmFailed
from millstream.replicas.reconcile import Running, reconcile
from millstream.replicas.starts import START_FAILURES, Release, Starts

TICK_S = 1.0  # a lost wake-up costs at most this
LISTEN_S = 60.0  # with no timeout at all, some releases of redis-py take that of the socket
STALL_S = 2.5  # without an answer of the server: it answers within milliseconds, and is asked every 1.25 s
MOST_WAVES = 20  # deployments of one application that are drained one after the other, the rest at once
log = logging.getLogger("millstream.launcher")
T = TypeVar("T")


class Launcher:
    """`run()` until `stop()`; then everything drains."""

    def __init__(self, settings: Settings, node: str | None = None) -> None:
        self._settings, self._lease = settings, Lease.of(settings)
        self.node = check_name("node", node) if node else f"{socket.gethostname().split('.')[0]}-{secrets.token_hex(2)}"
        self._client: Any = open_control(settings, f"ms:launcher:{self.node}")
        self._run = partial(run, self._client)
        self._ask = self._client.execute_command
        self._registry = Registry(self._client, settings)
        self._membership = Membership(self._registry, self._run, self.node, self._lease.ttl_s)
        self._supplier = Supplier(settings, self._run)
        self._sweeper = Sweeper(settings, self._run, self._ask)
        self._parents = Parents(settings)
        self._starts = Starts()
        self._replicas: dict[str, ReplicaProcess] = {}
        self._outage = Outage(log)
        self._plan: dict[str, Planned] = {}
        self._warming: set[tuple[str, str]] = set()  # (app, version) whose parent is about to be looked for
        self._nudge = asyncio.Event()
        self._tasks: TaskGroup | None = None
        self._is_stopping = False
        self._answered_at = time.monotonic()

    async def run(self) -> None:
        """Work until stopped. Outages of the server are waited out."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                self._parents.start_spare()
                for loop in (self._renew_loop, self._sweep_loop, self._listen_loop):
                    tasks.start_soon(self._guarded, loop)
                await self._guarded(self._reconcile_loop)
                await self._drain_all()
                tasks.cancel_scope.cancel()
        finally:
            self._parents.close()
            await self._client.aclose()

    def stop(self) -> None:
        """Drain everything and end."""
        self._is_stopping = True
        self._nudge.set()

    # loops

    async def _guarded(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop; an outage is waited out, blamed on no replica, and makes the sweeper start its watch over."""
        delays = backoff()
        while not self._is_stopping:
            try:
                await loop()
                return
            except NO_RIGHT:
                raise
            except ANY_TROUBLE as e:
                self._outage.began(e)
                self._sweeper.connection_was_broken()
                await anyio.sleep(next(delays))
                self._blame_nobody()

    def _blame_nobody(self) -> None:
        """A replica is well if the server answers it: whoever was silent while that answered nobody has another go."""
        for process in self._replicas.values():
            process.well_at = time.monotonic()

    def _notice_a_stall(self) -> None:
        """A server that takes no writes of ours takes none of our replicas, and answers their sweeps with silence."""
        if time.monotonic() - self._answered_at > max(STALL_S, self._lease.renew_every_s + 1.0):
            self._blame_nobody()

    async def _reconcile_loop(self) -> None:
        await self._membership.join()
        while not self._is_stopping:
            self._nudge.clear()
            await self.step()
            with anyio.move_on_after(TICK_S):
                await self._nudge.wait()

    async def _renew_loop(self) -> None:
        while True:
            await self._membership.renew(self._replicas.values())
            self._notice_a_stall()
            self._answered_at = time.monotonic()
            self._outage.ended()
            await anyio.sleep(self._lease.renew_every_s)

    async def _sweep_loop(self) -> None:
        while True:
            await anyio.sleep(self._lease.look_every_s * random.uniform(0.8, 1.2))
            tags = [tag for record in (await self._registry.apps()).values() for tag in record.all_tags]
            await self._sweeper.step_all(tags, partial(run_all, self._client))

    async def _listen_loop(self) -> None:
        """Reconcile at once when the plan changes."""
        async with self._client.pubsub() as subscription:
            await subscription.subscribe(self._registry.keys.node_wake(self.node))
            while True:
                if await subscription.get_message(ignore_subscribe_messages=True, timeout=LISTEN_S) is not None:
                    self._nudge.set()

    # one pass

    async def step(self) -> None:
        """Compare the plan with what runs; start, drain, update, and kill what does not answer."""
        plan = self._plan = await self._registry.plan(self.node, self._plan)
        actions = reconcile(plan, self._running(plan))
        for replica in actions.drain:
            await self._drain(self._replicas.get(replica))  # it may have died meanwhile, or not have been forked yet
        for (tag, version), count in actions.start.items():
            if self._starts.may_begin(Release(tag, version, plan[tag].revision)):
                for _ in range(count):
                    self._starts.begin(tag, version)
                    self._start_task(self._start(tag, version))
        for replica in actions.update:
            await self._update(self._replicas.get(replica))
        used = {(tag.partition(".")[0], planned.version) for tag, planned in plan.items()}
        for app, version in used - self._warming:
            if not self._parents.knows(app, version) and not self._starts.has_given_up(version):
                self._warming.add((app, version))
                self._start_task(self._warm_up(app, version))
        await self._kill_the_hung()
        busy = {(tag.partition(".")[0], version) for tag, version in self._starts.under_way}
        self._parents.close_unused(used | busy)

    def _running(self, plan: dict[str, Planned]) -> list[Running]:
        def is_spent(r: ReplicaProcess) -> bool:
            return r.is_spent or (r.stuck_at != "" and r.tag in plan and plan[r.tag].revision == r.stuck_at)

        running = [
            Running(
                r.replica, r.tag, r.version, r.is_ready, r.is_draining, r.ongoing, r.heading, r.is_updating, is_spent(r)
            )
            for r in self._replicas.values()
        ]
        for (tag, version), count in self._starts.under_way.items():
            running += [Running(f"~{i}", tag, version, False, False) for i in range(count)]
        return running

    async def _update(self, process: ReplicaProcess | None) -> None:
        """Tell a replica the config that is in force, if it does not know yet."""
        if process is None:
            return
        current = await self._registry.current(process.tag)
        if current is not None and current.version == process.version and current.revision != process.heading:
            await process.update(current)

    async def _drain(self, process: ReplicaProcess | None) -> None:
        if process is not None and not process.is_draining:
            config = await self._config(process.tag)
            await process.drain(config.graceful_shutdown_timeout_s)

    async def _config(self, tag: str) -> DeploymentConfig:
        current = await self._registry.current(tag)
        return DeploymentConfig() if current is None else current.config

    async def _kill_the_hung(self) -> None:
        self._kill_the_late()
        self._notice_a_stall()
        now = time.monotonic()
        for process in list(self._replicas.values()):
            silent_s = now - process.well_at
            if not process.is_ready or silent_s <= 2 * TICK_S:  # one that drains says that it is well, too
                continue
            if silent_s > (await self._config(process.tag)).health_check_timeout_s:
                log.warning("replica %s has not answered for %.0f s: killed", process.replica, silent_s)
                process.kill(f"killed: no sign of life for {silent_s:.0f} s")

    # starting

    async def _warm_up(self, app: str, version: str) -> None:
        """Import the application ahead of its first replica: what is deployed at zero answers its first request fast."""
        tags: dict[str, DeploymentConfig] = {}
        try:
            tags = await self._registry.of_version(app, version)
            methods = {config.start_method for config in tags.values()}
            if methods - {"spawn"} and not self._parents.knows(app, version):
                await self._parents.find(app, version, list(tags), fork_anyway="fork" in methods)
        except WarmFailed as e:
            for tag in tags:
                await self._cannot_import(tag, version, e)
        except ANY_TROUBLE:
            return  # the next pass tries again
        finally:
            self._warming.discard((app, version))

    async def _start(self, tag: str, version: str) -> None:
        process = None
        try:
            process = await self._fork(tag, version)
        except WarmFailed as e:
            await self._cannot_import(tag, version, e)
        except ANY_TROUBLE as e:
            log.warning("replica of %s not started: %s", tag, e)
        finally:  # in one go with its entry among the replicas: a pass in between would count it twice, and drain it
            self._starts.end(tag, version)
        if process is not None:
            await self._for_sure(lambda: self._membership.enlist(process))
            if process.replica not in self._replicas:  # it has died, and may have been buried before it was listed
                await self._for_sure(lambda: self._membership.strike(process))

    async def _fork(self, tag: str, version: str) -> ReplicaProcess | None:
        current = await self._registry.current(tag)
        if current is None or current.version != version:
            return None  # replaced meanwhile; the plan will say so
        app, config, parent = tag.partition(".")[0], current.config, None
        tags = list(await self._registry.of_version(app, version))
        if config.start_method != "spawn":
            parent = await self._parents.find(app, version, tags, fork_anyway=config.start_method == "fork")
        if parent is None:
            parent = await self._parents.become(app, tags)
        replica = f"r-{secrets.token_hex(3)}"
        await self._membership.lease(tag, replica)
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        ours, theirs = socket.socketpair()
        order = {
            "tag": tag, "replica": replica, "node": self.node, "version": version, "revision": current.revision,
            "config": config.to_json(),
        }  # fmt: skip
        try:
            pid = await parent.fork(order, [out_write, err_write, theirs.fileno()])
        finally:
            for fd in (out_write, err_write):
                os.close(fd)
            theirs.close()
        process = ReplicaProcess(replica, tag, current, pid, parent, Control(ours))
        self._replicas[replica] = process
        prefix = prefix_of(tag, replica)
        self._start_task(relay(out_read, prefix, sys.stdout))
        self._start_task(relay(err_read, prefix, sys.stderr))
        self._start_task(process.listen(self._heard))
        process.watch(self._died)
        return process

    async def _cannot_import(self, tag: str, version: str, error: WarmFailed) -> None:
        current = await self._for_sure(lambda: self._registry.current(tag))
        if current is not None and current.version == version:
            await self._give_up(Release(tag, version, current.revision), str(error), error.traceback)

    async def _give_up(self, release: Release, message: str, traceback: str) -> None:
        """What cannot start fails; but where a replica still goes by an earlier config, that one is in force again."""
        tag, version, revision = release
        log.error("%s cannot start: %s\n%s", tag, message, traceback)
        self._starts.give_up(release)
        siblings = [p for p in self._replicas.values() if (p.tag, p.version) == (tag, version) and p.is_ready]
        of_before = [p.works_by for p in siblings if p.works_by.revision != revision and not p.is_spent]
        if of_before:
            await self._for_sure(lambda: self._registry.withdraw(tag, revision, of_before[0], message, traceback))
        else:
            await self._for_sure(lambda: self._registry.fail(tag, revision, message, traceback))

    # what replicas say, and their end

    def _heard(self, process: ReplicaProcess, message: Message) -> None:
        process.hear(message)
        if "ready" in message:
            self._starts.succeeded(Release(process.tag, process.version, process.works_by.revision))
        elif "refused" in message:
            self._start_task(self._withdraw(process, message))
        elif "unhealthy" in message:
            process.kill(f"killed: {message['unhealthy']}")
        elif "recycling" in message:
            process.expect_end(message["grace_s"])
        if "well" not in message:
            self._nudge.set()

    async def _withdraw(self, process: ReplicaProcess, said: Message) -> None:
        """A replica could not take its new config over: the one that it works by is in force again."""
        text = f"replica {process.replica}: {said['message']}"
        log.error("%s did not take its new config over: %s\n%s", process.tag, text, said["traceback"])
        answer = await self._for_sure(
            lambda: self._registry.withdraw(process.tag, said["refused"], process.works_by, text, said["traceback"])
        )
        process.is_spent = answer is control_scripts.Withdrawn.SPENT
        self._nudge.set()

    async def _for_sure(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something that may be done twice, however long the server is away."""
        delays = backoff()
        while True:
            try:
                return await work()
            except ANY_TROUBLE:
                await anyio.sleep(next(delays))

    def _died(self, process: ReplicaProcess) -> None:
        self._replicas.pop(process.replica, None)
        self._start_task(self._bury(process))

    async def _bury(self, process: ReplicaProcess) -> None:
        how = await process.parent.how_it_ended(process.pid, 0.02)
        how = process.condemned or how
        is_in_order = process.is_draining or how == "exited"  # it drains by itself when it first hears of a removal
        keys = self._registry.keys_of(process.tag)
        requeued = await self._for_sure(
            lambda: bury(
                self._run, self._ask, self._supplier, self._registry.signer, keys, process.replica, how, expired=False
            )
        )
        if not is_in_order:
            cause = process.failure[0] if process.failure else how
            await self._for_sure(lambda: self._registry.note_death(process.tag, process.replica, cause))
        if requeued or (process.is_ready and not is_in_order):
            also = f"; {requeued} requests go to others" if requeued else ""
            log.warning("replica %s of %s (pid %d) %s%s", process.replica, process.tag, process.pid, how, also)
        if not process.is_draining:
            await self._count_death(process, how)
        self._nudge.set()

    async def _count_death(self, process: ReplicaProcess, how: str) -> None:
        """Slow down restarts of what dies young, and give up on what never gets ready."""
        self._starts.lived(process.tag, time.monotonic() - process.started_at)
        release = Release(process.tag, process.version, process.works_by.revision)
        if not process.is_ready and self._starts.failed(release):
            message, traceback = process.failure or (f"its process {how} while starting", "")
            message = f"{message} ({START_FAILURES} times in a row)"
            await self._give_up(release, message, traceback)

    # the node itself

    async def _drain_all(self) -> None:
        """Drain every replica, wait for their ends, and take the node off the list."""
        try:
            await self._membership.leave()
        except ANY_TROUBLE as e:
            log.warning("the node could not be taken off the list: %s", e)
        give_up = time.monotonic() + DeploymentConfig().graceful_shutdown_timeout_s
        for tags in [*await self._callers_first(), [process.tag for process in self._replicas.values()]]:
            for process in [process for process in self._replicas.values() if process.tag in tags]:
                try:
                    await self._drain(process)
                except ANY_TROUBLE:
                    await process.drain(DeploymentConfig().graceful_shutdown_timeout_s)
            while time.monotonic() < give_up and any(process.tag in tags for process in self._replicas.values()):
                self._kill_the_late()
                await anyio.sleep(0.01)
        while self._replicas:
            self._kill_the_late()
            await anyio.sleep(0.01)

    async def _callers_first(self) -> list[list[str]]:
        """Tags in the order to drain them: what finishes its requests may need those that it calls."""
        try:
            records = (await self._registry.apps()).values()
        except ANY_TROUBLE:
            return []
        return [[record.tags[i] for record in records if i < len(record.tags)] for i in range(MOST_WAVES)]

    def _kill_the_late(self) -> None:
        for process in list(self._replicas.values()):
            if process.kill_at is not None and time.monotonic() > process.kill_at:
                log.warning("replica %s did not end in time: killed", process.replica)
                process.kill()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        async def go() -> None:
            await work

        assert self._tasks is not None
        self._tasks.start_soon(go)
