"""An installation as the dashboard would find it, written straight into the registry's records. No process runs."""

import time

from millstream.broker import control_scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import Keys
from millstream.broker.records import NewDeployment, NodeRecord, ReplicaRecord
from millstream.broker.registry import Registry
from millstream.config import AutoscalingConfig, DeploymentConfig, Settings
from tests.helpers import claim, seed_delayed, seed_parked, seed_queued

NODE = "mill-1"
LEASE_S = 600
MODEL = "shop.Model"  # autoscaled, busy
GATE = "shop.Gate"  # fixed, idle
BROKEN = "shop.Broken"  # cannot start
REASON = "12.0 arrivals/s of 200 ms need 3.0, 2 in flight need 1.0, 40 waiting need 0.4 more"


async def seed_control_plane(client: Control, settings: Settings) -> int:
    """A node and an autoscaler that live; the autoscaler's fencing number."""
    registry = Registry(client, settings)
    keys = registry.keys
    record = NodeRecord(NODE, "mill.example", 4711, int(time.time() * 1000) - 3_600_000)
    await registry.client.hset(keys.nodes, NODE, registry.signer.write(record, NODE))
    await run(client, control_scripts.renew([keys.node_lease(NODE)], LEASE_S, NODE))
    return await run(client, control_scripts.lead(keys, "a1b2c3d4", LEASE_S))


async def seed_shop(client: Control, settings: Settings) -> None:
    """One application of three deployments: one busy, one idle, one that cannot start."""
    fence = await seed_control_plane(client, settings)
    registry = Registry(client, settings)
    scaling = AutoscalingConfig(min_replicas=1, max_replicas=8)
    record = await registry.deploy(
        "shop",
        "Gate",
        [
            NewDeployment("Gate", DeploymentConfig(num_replicas=2), b"never opened here"),
            NewDeployment("Model", DeploymentConfig(autoscaling=scaling), b"never opened here"),
            NewDeployment("Broken", DeploymentConfig(user_config={"token": "hush"}), b"never opened here"),
        ],
    )
    await decide(client, settings, fence, GATE, 2, "num_replicas=2")
    await decide(client, settings, fence, MODEL, 1, "first deployment: initial_replicas or min_replicas")
    await decide(client, settings, fence, MODEL, 3, REASON, was=1, waiting=40, arrivals_per_s=12.0, service_time_s="")
    await decide(client, settings, fence, BROKEN, 1, "num_replicas=1")
    for tag, replica, state in (
        (GATE, "g1", "RUNNING"),
        (GATE, "g2", "RUNNING"),
        (MODEL, "m1", "RUNNING"),
        (MODEL, "m2", "STARTING"),
    ):
        await seed_replica(client, settings, tag, replica, state, record.version)
    await registry.fail(
        BROKEN, record.version, "its constructor raised <b>ValueError</b>", "Traceback: <script>x()</script>"
    )
    await seed_requests(client, settings)


async def seed_requests(client: Control, settings: Settings) -> None:
    """Model: 7 waiting, 3 in flight, 1 parked, 2 delayed."""
    keys = Keys(settings.namespace).deployment(MODEL)
    await seed_queued(client, keys, 10)
    await claim(client, keys, 3, replica="m1")
    await seed_parked(client, keys)
    await seed_delayed(client, keys)
    await seed_delayed(client, keys)


async def seed_replica(client: Control, settings: Settings, tag: str, replica: str, state: str, version: str) -> None:
    registry = Registry(client, settings)
    record = ReplicaRecord(replica, NODE, 5000, version, state, int(time.time() * 1000) - 90_000, revision=version)
    keys = registry.keys_of(tag)
    await run(client, control_scripts.renew([keys.lease(replica)], LEASE_S, NODE))
    await registry.client.hset(keys.replicas, replica, registry.signer.write(record, tag, replica))


async def decide(
    client: Control, settings: Settings, fence: int, tag: str, target: int, reason: str, *,
    was: int | str = "", **inputs: object,
) -> None:  # fmt: skip
    """A scaling decision on record."""
    keys = Keys(settings.namespace).deployment(tag)
    record = {"was": was, "by": "a1b2c3d4", **inputs}
    assert await run(client, control_scripts.decide(keys, fence, target, reason, record)) == "decided"
