"""Requests whose code raised and that are to be tried again: told to the server until it has answered."""

import asyncio
import json
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from millstream.broker import remote_errors, scripts
from millstream.broker.connection import backoff
from millstream.broker.keys import DeploymentKeys
from millstream.broker.supplying import Run
from millstream.errors import BrokerUnavailableError
from millstream.replicas.attempt import Attempt
from millstream.retry import Retry

POSTPONED_MS = 200  # a replica takes longer to start
AT_ONCE = 100  # per call: the server does nothing else meanwhile
log = logging.getLogger("millstream.replica")


class Retries:
    """Decides by the rule of the caller, or else of the deployment, and holds what the server does not know yet."""

    def __init__(
        self,
        keys: DeploymentKeys,
        replica: str,
        rule: Retry | None,
        run: Run,
        start_chore: Callable[[Coroutine[Any, Any, None]], None],
        chance: random.Random | None = None,
    ) -> None:
        self._keys, self._replica, self.rule = keys, replica, rule
        self._run, self._start_chore = run, start_chore
        self._chance = chance or random.Random()
        self._unknown: dict[tuple[str, bytes], tuple[bytes, int, str]] = {}  # place -> ref, delay_ms, how it ended
        self._is_sending = False

    def takes(self, attempt: Attempt, error: BaseException) -> bool:
        """Is this request tried again? Then it is none of the caller's business any more."""
        rule = attempt.retry or self.rule
        if rule is None or not rule.applies_to(error, attempt.retries):
            return False
        delay_ms = round(rule.delay_s(attempt.retries, self._chance) * 1000)
        ending = {"replica": self._replica, "cause": f"raised {remote_errors.in_short(error)}"}
        self._add(attempt, delay_ms, json.dumps(ending))
        return True

    def postpone(self, attempt: Attempt) -> None:
        """Nothing of it has run here, and others may be able to: let one of them take it a little later."""
        self._add(attempt, POSTPONED_MS, "")

    def _add(self, attempt: Attempt, delay_ms: int, ending: str) -> None:
        self._unknown[attempt.place] = (attempt.ref, delay_ms, ending)
        if not self._is_sending:
            self._is_sending = True
            self._start_chore(self._send())

    def holds(self, lane: str, entry: bytes) -> bool:
        """Has this entry ended here, with the server not yet knowing?"""
        return (lane, entry) in self._unknown

    async def _send(self) -> None:
        delays = backoff()
        await asyncio.sleep(0)  # what ends in this pass of the loop goes out together
        try:
            while self._unknown:
                lane = next(iter(self._unknown))[0]
                batch = [place for place in self._unknown if place[0] == lane][:AT_ONCE]
                failures = [part for place in batch for part in (place[1], *self._unknown[place])]
                try:
                    refused = await self._run(scripts.retry(self._keys, lane, failures))
                except Exception as e:
                    if not isinstance(e, BrokerUnavailableError):
                        log.error("retry was refused by the server and will be tried again: %s", e)
                    await asyncio.sleep(next(delays))
                    continue
                delays = backoff()
                for position, place in enumerate(batch):
                    ref, _, _ = self._unknown.pop(place)
                    if position in refused:
                        log.info("request %s~%s was ended before it could be tried again", self._keys.tag, ref.decode())
        finally:
            self._is_sending = False
