"""The life of one replica: construct the user's object, register, claim and run requests, drain, say goodbye.

It runs in a process of its own, forked from the warm parent of its application. Its launcher renews its lease, sees
its death and speaks with it over a socket; when the launcher dies, the replica drains.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from millstream.broker import scripts
from millstream.broker.codec import codec_for
from millstream.broker.connection import Outage, backoff
from millstream.broker.definitions import Definition
from millstream.broker.keys import Keys
from millstream.broker.link import Link, dial
from millstream.broker.registry import ReplicaRecord
from millstream.broker.remote_errors import user_traceback
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import LEASE_S, Sweeper, bury
from millstream.config import DeploymentConfig, Settings
from millstream.errors import BrokerUnavailableError
from millstream.replicas.control import Control
from millstream.replicas.execution import Executor
from millstream.replicas.finisher import Finisher
from millstream.replicas.intake import Intake
from millstream.replicas.large import LargeValues
from millstream.replicas.loader import Served, build
from millstream.replicas.orders import Orders, ServerClock, expire, give_up
from millstream.replicas.streaming import Emitters

HOUSEKEEPING_S = 1.0
log = logging.getLogger("millstream.replica")


@dataclass(frozen=True, slots=True)
class Birth:
    """What a replica is told when it is made."""

    tag: str
    replica: str
    node: str
    version: str
    config: DeploymentConfig


class Replica:
    """One replica. `run()` is its whole life; its return value is the process's exit code."""

    def __init__(self, settings: Settings, birth: Birth, definition: Definition, control: Control) -> None:
        self._settings, self._birth, self._definition, self._control = settings, birth, definition, control
        self._keys = Keys(settings.namespace).deployment(birth.tag)
        self._record = ReplicaRecord(
            birth.replica, birth.node, os.getpid(), birth.version, "STARTING", int(time.time() * 1000)
        )
        self._chores: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self._reads: Link | None = None  # may be blocked in the server
        self._writes: Link | None = None
        self._hears: Link | None = None  # orders
        self._clock = ServerClock()
        self._orders: Orders
        self._emitters: Emitters
        self._intake: Intake | None = None

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        listening = asyncio.create_task(self._listen())
        try:
            served = await self._construct()
            if served is None:
                return 1
            return await self._serve(served)
        finally:
            listening.cancel()

    async def _construct(self) -> Served | None:
        """Build the user's object; what its constructor raises goes to the launcher, which decides what follows."""
        try:
            return await build(self._definition, self._birth.tag, self._birth.config.user_config)
        except BaseException as e:
            message = f"its constructor raised {type(e).__name__}: {e}"
            await self._control.send({"failed": message, "traceback": user_traceback(e)})
            return None

    async def _serve(self, served: Served) -> int:
        config = self._birth.config
        codec = codec_for(self._settings.secret_key, self._settings.namespace, self._birth.tag)
        supplier = Supplier(self._settings, self._run)
        finisher = Finisher(self._keys, int(config.result_ttl_s), supplier, self._start_chore)
        large = LargeValues(self._settings, self._keys, self._birth.replica)
        cancel = partial(give_up, self._run, supplier, self._keys)
        self._emitters = Emitters(self._keys, codec, large, int(config.result_ttl_s), cancel)
        executor = Executor(
            served,
            codec,
            finisher,
            large,
            self._emitters,
            threads=config.sync_threads,
            where=f"replica {self._birth.replica}, pid {os.getpid()}",
            now_ms=self._clock.now_ms,
            expire=partial(expire, self._run, supplier, self._keys),
        )
        finisher.on_lost_value = executor.value_was_lost
        self._orders = Orders(self._keys, executor, self._emitters, self._recycle)
        self._intake = intake = Intake(self._keys, self._birth.replica, executor, served.max_ongoing(config))
        serving = asyncio.create_task(self._stay_connected(intake, finisher))
        housekeeping = asyncio.create_task(self._keep_house(intake, executor))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            await self._drain(intake, executor, finisher, serving, supplier)
            return 0
        finally:
            for task in (serving, housekeeping, stopping, *self._chores):
                task.cancel()
            executor.close()
            large.close()
            # What still runs is cancelled by the end of the loop. That must not reach the server as the request's failure.
            self._hang_up()

    # serving

    async def _stay_connected(self, intake: Intake, finisher: Finisher) -> None:
        """Connect, claim until the connection is lost, and again: until draining."""
        delays, outage = backoff(), Outage(log)
        while not intake.is_draining:
            try:
                reads = self._reads = await dial(self._settings, f"ms:reads:{self._birth.replica}")
                writes = self._writes = await dial(self._settings, f"ms:writes:{self._birth.replica}")
                hears = self._hears = await dial(
                    self._settings, f"ms:hears:{self._birth.replica}", self._orders.on_message
                )
                await hears.ask("SSUBSCRIBE", self._keys.orders(self._birth.replica))
                await self._come_up(reads, writes, intake, finisher)
                delays = backoff()
                outage.ended()
                await self._claim_until_lost(intake, reads, writes, hears)
                return
            except BrokerUnavailableError as e:
                outage.began(e)
                await asyncio.sleep(next(delays))
            finally:
                if not intake.is_draining:
                    self._hang_up()

    async def _claim_until_lost(self, intake: Intake, reads: Link, writes: Link, hears: Link) -> None:
        """Claim until draining. Raises BrokerUnavailableError when a connection is lost, also while all slots are taken."""
        claiming = asyncio.create_task(intake.run(reads, writes))
        try:
            await asyncio.wait([claiming, reads.lost, writes.lost, hears.lost], return_when=asyncio.FIRST_COMPLETED)
            if not claiming.done():
                raise BrokerUnavailableError("a connection to the server was lost")
            await claiming
        finally:
            claiming.cancel()

    def _hang_up(self) -> None:
        for link in (self._reads, self._writes, self._hears):
            if link is not None:
                link.close()

    async def _come_up(self, reads: Link, writes: Link, intake: Intake, finisher: Finisher) -> None:
        if not await writes.ask("EXISTS", self._keys.config):
            log.info("deployment %s is gone: replica %s ends", self._birth.tag, self._birth.replica)
            intake.is_draining = True  # `run` then takes in nothing, and the drain says goodbye
            return
        await writes.run(scripts.groups(self._keys))
        await self._register("RUNNING", [reads.client_id, writes.client_id])
        await self._clock.set(writes.ask)
        await intake.reconcile(reads, writes)
        self._resume(writes, finisher)
        await self._control.send({"ready": [reads.client_id, writes.client_id]})

    def _resume(self, writes: Link, finisher: Finisher) -> None:
        """Send what waits; the items of streams ahead of their results."""
        self._emitters.resume(writes)
        finisher.resume(writes)

    def _recycle(self, why: str) -> None:
        """End this process in order, and have the launcher start another at once."""
        log.warning("replica %s is replaced: %s", self._birth.replica, why)
        self._start_chore(self._control.send({"recycling": why}))
        self._stop.set()

    async def _register(self, state: str, connections: list[int] | None = None) -> None:
        """Lease first: a replica that is listed without one is dead."""
        known = self._record.connections if connections is None else connections
        self._record = replace(self._record, state=state, connections=known)
        await self._renew_lease()
        await self._ask("HSET", self._keys.replicas, self._birth.replica, json.dumps(asdict(self._record)))

    async def _renew_lease(self) -> None:
        await self._run(scripts.renew([self._keys.lease(self._birth.replica)], LEASE_S, self._birth.replica))

    async def _keep_house(self, intake: Intake, executor: Executor) -> None:
        """Once a second: sweep our deployment, and tell the launcher that we are well (if the server answers us)."""
        sweeper = Sweeper(self._settings, self._run, self._ask)
        while True:
            await asyncio.sleep(HOUSEKEEPING_S * random.uniform(0.8, 1.2))
            try:
                await sweeper.step(self._birth.tag)
                await self._clock.set(self._ask)
                await self._orders.check(self._ask)
                await self._emitters.look()
                if not await self._ask("EXISTS", self._keys.config):
                    self._stop.set()  # the deployment was removed; usually the launcher says so first
                if self._control.is_orphaned:
                    await self._renew_lease()
            except BrokerUnavailableError:
                sweeper.connection_was_broken()
            else:
                await self._control.send({"well": len(executor.running)})

    async def _listen(self) -> None:
        """Obey the launcher; without one, drain."""
        async for message in self._control.messages():
            if "drain" in message:
                self._stop.set()
        log.warning(
            "the launcher of node %s is gone: replica %s finishes what it runs and ends",
            self._birth.node,
            self._birth.replica,
        )
        self._stop.set()

    # the end

    async def _drain(
        self, intake: Intake, executor: Executor, finisher: Finisher, serving: asyncio.Task[None], supplier: Supplier
    ) -> None:
        """Stop claiming, hand back what was not started, let the rest finish until the deadline, say goodbye."""
        try:
            async with asyncio.timeout(self._birth.config.graceful_shutdown_timeout_s):
                intake.is_draining = True
                executor.slot_freed.set()
                with contextlib.suppress(BrokerUnavailableError):  # what runs here may still end after the outage
                    await self._stop_reading()
                await asyncio.wait([serving])
                with contextlib.suppress(BrokerUnavailableError):
                    await self._hand_back(executor)
                await self._finish_up(executor, finisher)
                await bury(
                    self._run,
                    self._ask_about_others,
                    supplier,
                    self._keys,
                    self._birth.replica,
                    "drained",
                    expired=False,
                )
        except (TimeoutError, BrokerUnavailableError) as e:  # whoever buries us releases what we hold
            if left := len(executor.running):
                log.warning(
                    "replica %s could not finish in time (%s): %d requests run elsewhere",
                    self._birth.replica,
                    str(e) or "deadline",
                    left,
                )

    async def _stop_reading(self) -> None:
        await self._register("DRAINING")
        if self._reads is not None:
            await self._ask("CLIENT", "UNBLOCK", self._reads.client_id)

    async def _finish_up(self, executor: Executor, finisher: Finisher) -> None:
        """Wait until nothing runs and the server knows all outcomes; over a new connection where the old one was lost."""
        delays = backoff()
        while executor.running or self._chores or not finisher.is_idle:
            if self._writes is None or not self._writes.is_up:
                try:
                    self._writes = await dial(self._settings, f"ms:writes:{self._birth.replica}")
                    self._resume(self._writes, finisher)
                except BrokerUnavailableError:
                    await asyncio.sleep(next(delays))
            await asyncio.sleep(0.005)  # three owners would have to set an event; this runs once in a life

    async def _hand_back(self, executor: Executor) -> None:
        by_lane: dict[str, list[bytes]] = {}
        for lane, entry in executor.hand_back_unstarted():
            by_lane.setdefault(lane, []).append(entry)
        for lane, entries in by_lane.items():
            await self._run(scripts.hand_back(self._keys, lane, "returned", entries))

    # the server

    def _run(self, call: scripts.Call[Any]) -> asyncio.Future[Any]:
        if self._writes is None:
            return _down()
        return self._writes.run(call)

    def _ask(self, *command: Any) -> asyncio.Future[Any]:
        if self._writes is None:
            return _down()
        return self._writes.ask(*command)

    async def _ask_about_others(self, *command: Any) -> Any:
        """As `_ask`, but never kills a connection: the ones on record are ours."""
        return 0 if command[:2] == ("CLIENT", "KILL") else await self._ask(*command)

    def _start_chore(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


def _down() -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_exception(BrokerUnavailableError("the connection to the server is down"))
    return future
