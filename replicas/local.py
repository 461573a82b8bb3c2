"""Local mode: the node of a process that runs its replicas itself, on threads. For tests; `launcher.py` is for the rest.

It does what the launcher and the autoscaler of a small installation do, without processes: starts and drains replicas,
keeps their leases, buries them. It scales nothing, and kills nothing for being silent: that may be a breakpoint.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from millstream.broker import control_scripts
from millstream.broker.connection import DOWN, Outage, backoff, open_control, run
from millstream.broker.records import AppRecord, Planned, ReplicaRecord
from millstream.broker.registry import Registry
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import bury
from millstream.config import DeploymentConfig, Settings
from millstream.handles.engines import new_loop
from millstream.replicas.reconcile import Running, reconcile
from millstream.replicas.replica import Birth
from millstream.replicas.thread import PREFIX, Recipe, ReplicaThread

NODE = "local"
TICK_S = 1.0
# A debugger may hold all of our threads for minutes. Nobody is kept waiting by that: our server ends with us.
LEASE_S = 600.0
GRACE_S = 2.0  # more than a replica takes itself
CUT_S = 1.0  # after it was cut off, a thread that has not ended is left behind
log = logging.getLogger("millstream.local")


class LocalNode:
    """Made, it runs on a thread of its own until `close()`. Its methods are for other threads; those with `_` for its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.pid = settings, os.getpid()
        self.patience_s: float | None = None  # for what drains; None: each its graceful_shutdown_timeout_s
        self.trouble = ""  # why it does not run any more, if it does not
        self._hosted: dict[str, tuple[str, Recipe]] = {}  # tag -> version, recipe
        self._replicas: dict[str, ReplicaThread] = {}
        self._given_up: set[tuple[str, str]] = set()  # (tag, version) that cannot start
        self._not_before: dict[str, float] = {}  # tag -> when the next start may be, after a death
        self._client: Any = open_control(settings, f"ms:{NODE}")
        self._run, self._ask = partial(run, self._client), self._client.execute_command
        self._registry, self._supplier = Registry(self._client, settings), Supplier(settings, self._run)
        self._outage = Outage(log)
        self._is_closing = False
        self._loop = new_loop()
        self._nudge = asyncio.Event()
        self._after_pass: list[asyncio.Future[None]] = []  # of those who wait for a pass
        self._thread = threading.Thread(target=self._live, name=f"{PREFIX}local", daemon=True)
        self._thread.start()

    async def host(self, record: AppRecord, recipes: Mapping[str, Recipe]) -> None:
        """Run this version of an application, whose records are in Redis, from now on. From any loop.

        Returns when all its replicas serve and those of the last version claim nothing more; or when it cannot start, or
        was deleted meanwhile, which is in Redis then.
        """
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._host(record.version, recipes), self._loop))

    def close(self, patience_s: float | None = None) -> None:
        """Drain all replicas, callers first, and end. Those that have not ended after `patience_s` are cut off."""
        if patience_s is not None:
            self.patience_s = patience_s
        self._is_closing = True
        self._changed()
        self._thread.join()

    # what runs here

    async def _host(self, version: str, recipes: Mapping[str, Recipe]) -> None:
        for tag, recipe in recipes.items():
            await self._set_target(tag, recipe.replicas)
            self._hosted[tag] = (version, recipe)
        self._nudge.set()
        while any(self._is_under_way(tag, version) for tag in recipes):
            passed = self._loop.create_future()
            self._after_pass.append(passed)
            await passed

    async def _set_target(self, tag: str, replicas: int) -> None:
        """As an autoscaler does. There is none: the fence of the last one, if there ever was one, is ours."""
        keys = self._registry.keys_of(tag)
        fence = int(await self._client.hget(keys.status, "fence") or 0)
        record = {"was": "", "by": NODE}
        await self._run(control_scripts.decide(keys, fence, replicas, "local mode: nothing is scaled", record))

    def _is_under_way(self, tag: str, version: str) -> bool:
        """Is there more to come of a start or an exchange of replicas?"""
        hosted, recipe = self._hosted.get(tag, ("", None))
        if recipe is None or hosted != version or (tag, version) in self._given_up:
            return False
        ready = sum(one.is_ready for one in self._of(tag) if one.birth.version == version)
        return ready < recipe.replicas or any(one.is_claiming for one in self._of(tag) if one.birth.version != version)

    # its thread

    def _live(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._work())
        except BaseException as e:
            log.exception("the local node ended")
            self.trouble = f"the local node ended: {e!r}"

    async def _work(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:  # anyio's takes 40 ms to load, when it is first used
                listening = tasks.create_task(self._listen())
                while not self._is_closing:
                    await self._pass()
                    await self._rest()
                await self._drain_all()
                listening.cancel()
        finally:
            await self._client.aclose()

    async def _listen(self) -> None:
        """Step at once when something is deployed or deleted, by whomever."""
        seen, delays = "$", backoff()
        while True:
            try:
                for _, entries in await self._client.xread({self._registry.keys.changes: seen}, block=5000) or ():
                    seen = entries[-1][0]
                    self._nudge.set()
                delays = backoff()
            except DOWN:
                await asyncio.sleep(next(delays))

    async def _pass(self) -> None:
        """One `step`. Outages are waited out."""
        self._nudge.clear()
        try:
            await self.step()
            self._outage.ended()
        except DOWN as e:
            self._outage.began(e)
        waiting, self._after_pass = self._after_pass, []
        for passed in waiting:
            if not passed.done():
                passed.set_result(None)

    async def _rest(self) -> None:
        """Until there is a reason for the next pass."""
        now = time.monotonic()
        moments = [one.cut_at + extra for one in self._replicas.values() if one.cut_at for extra in (0.0, CUT_S)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min([TICK_S, *(moment - now for moment in moments if moment > now)])):
                await self._nudge.wait()

    async def step(self) -> None:
        """Compare what should run with what does. On its own loop."""
        await self._bury_the_ended()
        if not self._is_closing:
            await self._reconcile()
        self._cut_the_late()
        await self._renew()
        await self._registry.retire()

    async def _reconcile(self) -> None:
        await self._drop_the_deleted()
        plan = {tag: Planned(recipe.replicas, version, version) for tag, (version, recipe) in self._hosted.items()}
        actions = reconcile(plan, [_seen(one) for one in self._replicas.values()])
        for replica in actions.drain:
            self._drain(self._replicas[replica])
        for (tag, version), count in actions.start.items():
            if (tag, version) not in self._given_up and self._not_before.get(tag, 0.0) <= time.monotonic():
                await self._start(tag, version, count)

    async def _drop_the_deleted(self) -> None:
        tags = list(self._hosted)
        async with self._client.pipeline(transaction=False) as pipe:
            for tag in tags:
                pipe.exists(self._registry.keys_of(tag).config)
            for tag, is_there in zip(tags, await pipe.execute(), strict=True):
                if not is_there:
                    del self._hosted[tag]

    async def _start(self, tag: str, version: str, count: int) -> None:
        keys, (_, recipe) = self._registry.keys_of(tag), self._hosted[tag]
        config = DeploymentConfig.from_json(recipe.config.to_json())  # as it comes out of Redis
        names = [f"r-{secrets.token_hex(3)}" for _ in range(count)]
        now_ms = int(time.time() * 1000)
        starting = [
            ReplicaRecord(name, NODE, self.pid, version, "STARTING", now_ms, revision=version) for name in names
        ]
        await self._run(control_scripts.renew([keys.lease(name) for name in names], LEASE_S, NODE))
        records = {one.replica: self._registry.signer.write(one, tag, one.replica) for one in starting}
        await self._client.hset(keys.replicas, mapping=records)
        for name in names:
            birth = Birth(tag, name, NODE, version, config, revision=version, is_thread=True)
            self._replicas[name] = ReplicaThread(self.settings, birth, recipe, self._changed)

    async def _renew(self) -> None:
        by_tag: dict[str, list[str]] = {}
        for name, one in self._replicas.items():
            by_tag.setdefault(one.birth.tag, []).append(name)
        for tag, names in by_tag.items():
            keys = self._registry.keys_of(tag)
            await self._run(control_scripts.renew([keys.lease(name) for name in names], LEASE_S, NODE))

    # the end of replicas

    def _drain(self, one: ReplicaThread) -> None:
        grace_s = one.birth.config.graceful_shutdown_timeout_s + GRACE_S
        cut_at = time.monotonic() + (grace_s if self.patience_s is None else min(grace_s, self.patience_s))
        one.cut_at = cut_at if one.cut_at is None else min(cut_at, one.cut_at)
        if not one.is_draining:
            one.drain()

    def _cut_the_late(self) -> None:
        now = time.monotonic()
        for one in self._replicas.values():
            if one.is_draining and one.cut_at is None:
                self._drain(one)
            if one.cut_at is None or one.end or now < one.cut_at:
                continue
            one.cut()
            if now >= one.cut_at + CUT_S:
                log.warning("replica %s does not end: the user's code keeps its thread, which is left behind", one.name)
                one.leave_behind()
                self._nudge.set()

    async def _bury_the_ended(self) -> None:
        for one in [one for one in self._replicas.values() if one.end]:
            keys = self._registry.keys_of(one.birth.tag)
            try:
                await bury(
                    self._run, self._ask, self._supplier, self._registry.signer, keys, one.name, one.end, expired=False
                )
                await self._record_failure(one)
            except DOWN:
                if not self._is_closing:  # else the server has gone before us
                    raise
            del self._replicas[one.name]

    async def _record_failure(self, one: ReplicaThread) -> None:
        """What cannot start is not tried again: what its constructor raised here it would raise again."""
        birth = one.birth
        if one.is_draining or (one.is_ready and one.end == "exited"):
            return
        if one.is_ready:
            log.error("replica %s of %s %s; it is started again", one.name, birth.tag, one.end)
            self._not_before[birth.tag] = time.monotonic() + TICK_S
            return
        self._given_up.add((birth.tag, birth.version))
        message, traceback = one.failure or (f"its replica {one.end} while it started", "")
        await self._registry.fail(birth.tag, birth.version, message, traceback)

    async def _drain_all(self) -> None:
        """Callers first, as the order of deployments has it: what finishes its requests may need those that it calls."""
        grace_s = DeploymentConfig().graceful_shutdown_timeout_s if self.patience_s is None else self.patience_s
        give_up = time.monotonic() + grace_s
        for tag in [*self._hosted, *[one.birth.tag for one in self._replicas.values()]]:
            for one in self._of(tag):
                self._drain(one)
            await self._pass()
            while self._of(tag) and time.monotonic() < give_up:
                await self._rest()
                await self._pass()
        while self._replicas:
            await self._rest()
            await self._pass()

    def _of(self, tag: str) -> list[ReplicaThread]:
        return [one for one in self._replicas.values() if one.birth.tag == tag]

    def _changed(self) -> None:
        """Any thread."""
        with contextlib.suppress(RuntimeError):  # closed: nobody waits for it any more
            self._loop.call_soon_threadsafe(self._nudge.set)


def _seen(one: ReplicaThread) -> Running:
    return Running(one.name, one.birth.tag, one.birth.version, one.is_ready, one.is_draining)
