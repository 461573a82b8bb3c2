"""The life of one replica: construct the user's object, register, claim and run requests, drain, say goodbye.

It runs in a process of its own, forked from the warm parent of its application. Its launcher renews its lease, sees
its death and speaks with it over a socket; when the launcher dies, the replica drains. In local mode it runs on a thread
instead, and its node does what a launcher does (`thread.py`, `local.py`).
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.cluster import dial, dial_everywhere
from millstream.broker.codec import codec_for
from millstream.broker.connection import Outage, backoff
from millstream.broker.definitions import Definition, max_ongoing
from millstream.broker.keys import Keys
from millstream.broker.lease import Lease
from millstream.broker.link import REFUSED, Link
from millstream.broker.records import Current, ReplicaRecord
from millstream.broker.signed import Signer
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import Sweeper, bury
from millstream.broker.tracebacks import user_traceback
from millstream.config import DeploymentConfig, Settings
from millstream.errors import BrokerUnavailableError, ConfigError
from millstream.replicas.context import ReplicaContext, inside
from millstream.replicas.control import Overseer
from millstream.replicas.execution import Executor
from millstream.replicas.expiry import Expiry, ServerClock
from millstream.replicas.finisher import Finisher
from millstream.replicas.health import Health, check
from millstream.replicas.intake import Intake
from millstream.replicas.large import LargeValues
from millstream.replicas.loader import Served, build
from millstream.replicas.orders import Orders, give_up
from millstream.replicas.retries import Retries
from millstream.replicas.streaming import Emitters
from millstream.replicas.updating import Updater
from millstream.replicas.versions import OtherVersions

HOUSEKEEPING_S = 1.0
NUDGE_S = 0.05
log = logging.getLogger("millstream.replica")


@dataclass(frozen=True, slots=True)
class Birth:
    """What a replica is told when it is made."""

    tag: str
    replica: str
    node: str
    version: str
    config: DeploymentConfig
    revision: str = ""  # of the config
    is_thread: bool = False  # of a process that goes on after it


class Replica:
    """One replica. `run()` is its whole life; its return value is the process's exit code."""

    def __init__(self, settings: Settings, birth: Birth, definition: Definition, control: Overseer) -> None:
        self._settings, self._birth, self._definition, self._control = settings, birth, definition, control
        self._lease, self._signer = Lease.of(settings), Signer(settings)
        self._keys = Keys(settings.namespace).deployment(birth.tag)
        self._record = ReplicaRecord(
            birth.replica, birth.node, os.getpid(), birth.version, "STARTING", int(time.time() * 1000),
            revision=birth.revision,
        )  # fmt: skip
        self._chores: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self._reads: Link | None = None  # may be blocked in the server
        self._writes: Link | None = None
        self._hears: Link | None = None  # orders
        self._clock = ServerClock()
        self._orders: Orders
        self._emitters: Emitters
        self._intake: Intake | None = None
        self._updater: Updater | None = None

    async def run(self) -> int:
        with inside(self._describe()):
            return await self._live()

    def _describe(self) -> ReplicaContext:
        birth = self._birth
        app, _, deployment = birth.tag.partition(".")
        ongoing = max_ongoing(self._definition.target, birth.config)
        return ReplicaContext(app, deployment, birth.replica, birth.node, birth.version, ongoing)

    async def _live(self) -> int:
        listening = asyncio.create_task(self._listen())
        try:
            served = await self._construct()
            if served is None:
                return 1
            return await self._serve(served)
        except ConfigError as e:  # the server's user lacks a right
            await self._control.send({"failed": str(e), "traceback": ""})
            return 1
        finally:
            listening.cancel()

    def stop(self) -> None:
        """Drain and end. On its loop; twice is as once."""
        self._stop.set()

    async def _construct(self) -> Served | None:
        """Build the user's object, configure it and ask how it does; what goes wrong the launcher hears, which decides."""
        config, step = self._birth.config, "its constructor"
        try:
            served = await build(self._definition, self._birth.tag)
            if config.user_config is not None:
                step = "its reconfigure(user_config)"
                await served.hooks.reconfigure(config.user_config)
        except BaseException as e:
            message = f"{step} raised {type(e).__name__}: {e}"
            await self._control.send({"failed": message, "traceback": user_traceback(e)})
            return None
        complaint = await check(served.hooks, config.health_check_timeout_s)
        if complaint is not None:
            message = f"its first check_health failed: {complaint.text}"
            await self._control.send({"failed": message, "traceback": complaint.traceback})
            return None
        return served

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
            expiry=Expiry(self._run, supplier, self._keys, self._clock, self._start_chore),
            threads=config.sync_threads,
            where=f"replica {self._birth.replica}, pid {os.getpid()}",
            retries=Retries(self._keys, self._birth.replica, config.retry, self._run, self._start_chore),
            other_versions=OtherVersions(self._keys, self._signer, self._birth.version, self._ask),
        )
        finisher.on_lost_value = executor.value_was_lost
        self._orders = Orders(self._keys, executor, self._emitters, self._ask, self._recycle)
        self._intake = intake = Intake(
            self._keys, self._birth.replica, executor, served.max_ongoing(config), self._lease.block_s,
            may_take_ahead=served.may_take_ahead(config),
        )  # fmt: skip
        intake.on_overdue = lambda: self._start_chore(self._hand_back(executor))
        intake.on_unreadable = lambda *entry: self._start_chore(self._bury_unreadable(*entry))
        self._updater = updater = self._make_updater(served, intake, executor, finisher)
        serving = asyncio.create_task(self._stay_connected(intake, finisher))
        housekeeping = asyncio.create_task(self._keep_house(intake, executor))
        updating = asyncio.create_task(updater.run(intake, executor, self._wake_read))
        health = Health(served.hooks, lambda: updater.config, lambda: intake.is_paused)
        checking = asyncio.create_task(health.run(self._control.send))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            checking.cancel()
            await self._drain(intake, executor, finisher, serving, supplier, updater, served)
            return 0
        finally:
            for task in (serving, housekeeping, updating, checking, stopping, *self._chores):
                task.cancel()
            large.close()
            self._hang_up()
            executor.close()

    def _make_updater(self, served: Served, intake: Intake, executor: Executor, finisher: Finisher) -> Updater:
        async def apply(current: Current) -> None:
            intake.resize(served.max_ongoing(current.config), may_take_ahead=served.may_take_ahead(current.config))
            executor.retries.rule = current.config.retry
            finisher.ttl_s = self._emitters.ttl_s = int(current.config.result_ttl_s)
            self._record = replace(self._record, revision=current.revision)
            delays = backoff()
            while True:  # whoever waits for the deploy waits for this record
                try:
                    await self._register(self._record.state)
                    return
                except BrokerUnavailableError:
                    await asyncio.sleep(next(delays))

        started_with = Current(self._birth.version, self._birth.revision, self._birth.config)
        return Updater(started_with, served.hooks, apply, self._control.send, self._stop.set)

    # serving

    async def _stay_connected(self, intake: Intake, finisher: Finisher) -> None:
        """Connect, claim until the connection is lost, and again: until draining."""
        delays, outage = backoff(), Outage(log)
        while not intake.is_draining:
            try:
                here = self._keys.prefix
                reads = self._reads = await dial(self._settings, f"ms:reads:{self._birth.replica}", near=here)
                writes = self._writes = await self._dial_writes()
                hears = self._hears = await dial(
                    self._settings, f"ms:hears:{self._birth.replica}", self._orders.on_message, near=here
                )
                await hears.ask("SSUBSCRIBE", self._keys.orders(self._birth.replica))
                await self._come_up(reads, writes, intake, finisher)
                delays = backoff()
                outage.ended()
                await self._claim_until_lost(intake, reads, writes, hears)
                return
            except (BrokerUnavailableError, *REFUSED) as e:
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

    async def _dial_writes(self) -> Link:
        """What ends here may supply requests of other deployments, whose keys may be on other nodes."""
        return await dial_everywhere(self._settings, f"ms:writes:{self._birth.replica}", near=self._keys.prefix)

    def _hang_up(self) -> None:
        for link in (self._reads, self._writes, self._hears):
            if link is not None:
                link.close()

    async def _come_up(self, reads: Link, writes: Link, intake: Intake, finisher: Finisher) -> None:
        if not await writes.ask("EXISTS", self._keys.config):
            log.info("deployment %s is gone: replica %s ends", self._birth.tag, self._birth.replica)
            intake.is_draining = True  # `run` then takes in nothing, and the drain says goodbye
            return
        await writes.run(control_scripts.groups(self._keys))
        await self._register("RUNNING", [reads.client_id, writes.client_id])
        await self._clock.set(writes.ask)
        await intake.reconcile(reads, writes)
        self._resume(writes, finisher)
        await self._control.send({"ready": [reads.client_id, writes.client_id]})

    def _resume(self, writes: Link, finisher: Finisher) -> None:
        """Send what waits; the items of streams ahead of their results."""
        self._emitters.resume(writes)
        finisher.resume(writes)

    async def _bury_unreadable(self, lane: str, entry: bytes, why: str) -> None:
        """Put an entry that is not a request with the dead letters. After an outage it is found in our pending list again."""
        with contextlib.suppress(BrokerUnavailableError):
            cause = f"it is not a request ({why}): some other program wrote it"
            try:
                await self._run(scripts.bury(self._keys, lane, entry, self._birth.replica, cause))
            except REFUSED as e:
                log.error("entry %s of %s cannot be buried: %s", entry.decode(), self._birth.tag, e)

    def _recycle(self, why: str) -> None:
        """End this process in order, and have the launcher start another at once."""
        log.warning("replica %s is replaced: %s", self._birth.replica, why)
        grace_s = self._birth.config.graceful_shutdown_timeout_s
        self._start_chore(self._control.send({"recycling": why, "grace_s": grace_s}))
        self._stop.set()

    async def _register(self, state: str, connections: list[int] | None = None) -> None:
        """Lease first: a replica that is listed without one is dead."""
        known = self._record.connections if connections is None else connections
        self._record = replace(self._record, state=state, connections=known)
        await self._renew_lease()
        text = self._signer.write(self._record, self._birth.tag, self._birth.replica)
        await self._run(control_scripts.enlist(self._keys.replicas, self._birth.replica, text))

    async def _renew_lease(self) -> None:
        lease, ttl_s = self._keys.lease(self._birth.replica), self._lease.ttl_s
        await self._run(control_scripts.renew([lease], ttl_s, self._birth.replica))

    async def _keep_house(self, intake: Intake, executor: Executor) -> None:
        """Once a second or more often, by the lease: sweep our deployment, and tell the launcher that we are well (if
        the server answers us)."""
        sweeper, outage = Sweeper(self._settings, self._run, self._ask), Outage(log)
        while True:
            await asyncio.sleep(min(HOUSEKEEPING_S, self._lease.look_every_s) * random.uniform(0.8, 1.2))
            try:
                # A launcher that is dead, or stands still, is no reason to take our requests from us.
                if not self._birth.is_thread:  # there, the node gives leases of its own length
                    await self._renew_lease()
                await sweeper.step(self._birth.tag)
                await self._clock.set(self._ask)
                await self._orders.check()
                await self._emitters.look()
                if not await self._ask("EXISTS", self._keys.config):
                    self.stop()  # the deployment was removed; usually the launcher says so first
            except BrokerUnavailableError:
                sweeper.connection_was_broken()
            except REFUSED as e:
                outage.began(e)
            else:
                outage.ended()
                await self._control.send({"well": len(executor.running)})

    async def _listen(self) -> None:
        """Obey the launcher; without one, drain."""
        async for message in self._control.messages():
            if "drain" in message:
                self.stop()
            elif "update" in message and self._updater is not None:
                config = DeploymentConfig.from_json(message["config"])
                self._updater.tell(Current(self._birth.version, message["update"], config))
        log.warning(
            "the launcher of node %s is gone: replica %s finishes what it runs and ends",
            self._birth.node,
            self._birth.replica,
        )
        self.stop()

    # the end

    async def _drain(
        self, intake: Intake, executor: Executor, finisher: Finisher, serving: asyncio.Task[None], supplier: Supplier,
        updater: Updater, served: Served,
    ) -> None:  # fmt: skip
        """Stop claiming, hand back what was not started, let the rest finish until the deadline, say goodbye."""
        try:
            async with asyncio.timeout(updater.config.graceful_shutdown_timeout_s):
                intake.is_draining = True
                executor.slot_freed.set()
                with contextlib.suppress(BrokerUnavailableError):  # what runs here may still end after the outage
                    await self._stop_reading(serving)
                await asyncio.wait([serving])
                await self._control.send({"draining": len(executor.running)})  # it claims nothing from here on
                await self._hand_back(executor)
                await self._finish_up(executor, finisher, updater)
                if not self._birth.is_thread:  # there, the collector calls __del__
                    await served.hooks.say_goodbye(f"replica {self._birth.replica} of {self._birth.tag}")
                await bury(
                    self._run,
                    self._ask_about_others,
                    supplier,
                    self._signer,
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

    async def _stop_reading(self, serving: asyncio.Task[None]) -> None:
        """End the claim loop, then say so: who has deployed goes by it that no request reaches this version any more."""
        while not serving.done():
            await self._wake_read()  # again and again: it may come a moment before the read blocks
            await asyncio.wait([serving], timeout=NUDGE_S)
        await self._register("DRAINING")

    async def _wake_read(self) -> None:
        if self._reads is not None:
            await self._ask("CLIENT", "UNBLOCK", self._reads.client_id)

    async def _finish_up(self, executor: Executor, finisher: Finisher, updater: Updater) -> None:
        """Wait until nothing runs and the server knows all outcomes; over a new connection where the old one was lost."""
        delays = backoff()
        while executor.running or self._chores or not finisher.is_idle or updater.is_busy:
            if self._writes is None or not self._writes.is_up:
                try:
                    self._writes = await self._dial_writes()
                    self._resume(self._writes, finisher)
                except BrokerUnavailableError:
                    await asyncio.sleep(next(delays))
            await asyncio.sleep(0.005)  # three owners would have to set an event; this runs once in a life

    async def _hand_back(self, executor: Executor) -> None:
        by_lane: dict[str, list[bytes]] = {}
        for lane, entry in executor.hand_back_unstarted():
            by_lane.setdefault(lane, []).append(entry)
        with contextlib.suppress(BrokerUnavailableError):  # they are found in our pending list after the outage
            for lane, entries in by_lane.items():
                await self._run(scripts.hand_back(self._keys, lane, "returned", entries))

    # the server

    def _run(self, call: Call[Any]) -> asyncio.Future[Any]:
        if self._writes is None:
            return _down()
        return self._writes.run(call)

    def _ask(self, *command: Any, near: str = "") -> asyncio.Future[Any]:
        """One command. `near` is what `bury` says of keys; ours are where `_writes` is at home."""
        if self._writes is None:
            return _down()
        return self._writes.ask(*command)

    async def _ask_about_others(self, *command: Any, near: str = "") -> Any:
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
