"""What clients, replicas, launchers and operators do, as coroutines that are driven one command at a time.

Where it is the product's own code that does several things (`Supplier`, `Sweeper`, `bury`, `Removal`), that is what runs.
"""

import json
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

from millstream.broker import control_scripts, remote_errors, scripts, sweeper
from millstream.broker.codec import codec_for
from millstream.broker.keys import DeploymentKeys
from millstream.broker.records import ReplicaRecord
from millstream.broker.removal import Removal
from millstream.broker.scripts import Finished, Submitted
from millstream.broker.signed import Signer
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import Sweeper
from millstream.config import Settings
from tests.broker.model.stepping import SteppingClient, ask, run
from tests.helpers import BODY, CALLER, Claimed

SETTINGS = Settings("redis://nowhere.invalid", secret_key=b"a secret for tests")
REVISION = "the revision"
RAISED = remote_errors.capture(ValueError("no"))
TTL_S = 3600
supplier, signer = Supplier(SETTINGS, run), Signer(SETTINGS)


class Attempt(NamedTuple):
    """What some replica holds, held, or believes to hold."""

    tag: str
    replica: str
    one: Claimed


# callers


async def send_large(keys: DeploymentKeys, ref: str) -> None:
    await ask("SET", keys.payload(ref), b"large arguments", "PX", 600_000)
    await run(scripts.submit(keys, CALLER, (ref.encode(), "normal", b"__call__", json.dumps({"payload": True}), b"")))


async def send_dependant(
    keys: DeploymentKeys, ref: str, lane: str, extras: dict[str, Any], delay_ms: int, needs: Sequence[str]
) -> None:
    """`needs`: ref ids."""
    asked = json.dumps(extras).encode() if extras else b""
    request = scripts.Held(ref.encode(), lane, b"__call__", asked, BODY, delay_ms, 0, needs)
    (held,) = await run(scripts.hold_all(keys, CALLER, [request]))
    for ref_id in needs if held is not Submitted.MISSING else ():
        await supplier.watch(f"{keys.tag}~{ref}", ref_id)


async def cancel(keys: DeploymentKeys, refs: Sequence[str], *, is_on_its_way: bool) -> None:
    """`is_on_its_way`: their caller does not know whether the server has them."""
    for ref in refs if is_on_its_way else ():
        await run(scripts.forestall(keys, ref, TTL_S, "it was not there yet"))
    _, waiters = await run(scripts.cancel(keys, TTL_S, "why not", refs))
    await supplier.supply_all(keys.tag, waiters)


async def expire(keys: DeploymentKeys, refs: Sequence[str]) -> None:
    _, waiters = await run(scripts.cancel(keys, TTL_S, "too late", refs, overdue=True))
    await supplier.supply_all(keys.tag, waiters)


# replicas


async def appear(keys: DeploymentKeys, replica: str) -> None:
    await run(control_scripts.groups(keys))
    record = ReplicaRecord(replica, "node", 1, "v1", "RUNNING", 0)
    await run(control_scripts.renew([keys.lease(replica)], TTL_S, "launcher"))
    await run(control_scripts.enlist(keys.replicas, replica, signer.write(record, keys.tag, replica)))


async def finish(keys: DeploymentKeys, attempts: Sequence[Claimed], *, succeeds: bool, is_large: bool) -> None:
    """All of one lane. As `replicas.finisher.Finisher` does it."""
    lane, outcomes, stored = attempts[0].lane, [], {}
    for one in attempts:
        state, envelope = b"succeeded", b"of %b" % one.entry
        if not succeeds:
            state, envelope = (
                b"failed",
                codec_for(SETTINGS.secret_key, "ms", keys.tag).seal("error", one.ref.encode(), RAISED),
            )
        elif is_large:
            envelope = b"@5"
            await ask("SET", keys.value(one.ref, one.entry.decode()), b"large", "PX", 600_000)
        outcomes += [one.entry, one.ref.encode(), CALLER, state.decode(), envelope]
        stored[one.ref.encode()] = b"%b %b %b\n%b" % (state, lane.encode(), one.entry, envelope)
    refused, waiters = await run(scripts.finish(keys, lane, TTL_S, outcomes))
    for position, why in refused.items():
        if is_large and why is not Finished.DONE:
            await ask("UNLINK", keys.value(attempts[position].ref, attempts[position].entry.decode()))
    await supplier.supply_all(keys.tag, waiters, stored)


async def bury(keys: DeploymentKeys, replica: str) -> None:
    """Its parent has seen it die."""
    await sweeper.bury(run, ask, supplier, signer, keys, replica, "killed", expired=False)


async def sweep(keys: DeploymentKeys) -> None:
    await Sweeper(SETTINGS, run, ask, clock=count(0, 3600).__next__).step(keys.tag)  # it has watched for long


# who deploys


async def deploy(keys: DeploymentKeys, config: dict[str, Any]) -> None:
    await run(control_scripts.groups(keys))
    limits = [str(config["max_attempts"]), str(TTL_S), config["max_queued"], config["timeout_ms"]]
    await run(control_scripts.deploy(keys, REVISION, "code", "{}", b"definition", limits, configured=False))


async def remove(keys: DeploymentKeys) -> None:
    await run(control_scripts.close(keys, REVISION))
    await Removal(SteppingClient(), SETTINGS).step(keys)  # type: ignore[arg-type]
