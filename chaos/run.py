"""One run: plan, world, aftermath, verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import environment
from chaos import aftermath, application, ledger
from chaos.judge import Fault, Verdict, judge
from chaos.plan import Harm, ServerFaults, faults
from chaos.world import Load, World, elsewhere
from millstream.broker.registry import Registry
from millstream.runtime import with_registry


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    faults: list[Fault]
    environment: dict[str, Any]  # machine and versions


def run(folder: Path, load: Load, how_many: dict[Harm, int], how: ServerFaults, say: Callable[[str], None]) -> Outcome:
    """Ledgers and logs of the processes are left in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with elsewhere(folder), World(folder, load, how, say) as world:
        world.run(faults(load.seed, load.duration_s, how_many))
        say("all clients have ended")
        lines = ledger.read(world.clients_ledger)[0] + ledger.read(world.replicas_ledger)[0]
        ref_ids = {line.what for line in lines if line.event == "ref"}

        async def look(registry: Registry) -> Verdict:
            left = await aftermath.settle(registry)
            stored = await aftermath.stored(registry, ref_ids)
            return judge(lines, world.faults, stored, [*left, *world.failures], application.HEALTH_TIMEOUT_S)

        return Outcome(with_registry(look), world.faults, environment())
