"""What a caller's process keeps of its requests: nothing but the results it holds."""

import pytest

from millstream.handles import engines
from tests.handles.scripts import run_script
from tests.replica_helpers import Serving


class Model:
    async def __call__(self, x: int) -> int:
        return x


@pytest.mark.timeout(150)  # some 7 s on a machine that does nothing else
@pytest.mark.parametrize(("how", "requests"), [("in order", 25_000), ("as completed", 25_000), ("on a loop", 100_000)])
def test_a_hundred_thousand_requests_of_a_map_cost_no_memory(serving: Serving, how: str, requests: int) -> None:
    serving(Model)

    script = f"""
        def look(number):
            if number in (10_000, {requests} - 1):
                gc.collect()
                with open("/proc/self/statm") as file:
                    seen.append(int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024)

        async def main():
            number = 0
            async for value in handle.map(range({requests})):
                look(number)
                number += 1

        seen = []
        if {how == "on a loop"}:
            asyncio.run(main())
        else:
            for number, value in enumerate(sync.map(range({requests}), ordered={how == "in order"})):
                look(number)
        say(seen[1] - seen[0])
    """

    assert (
        int(run_script(script, engines.settings(), dev=False, timeout_s=120)) < 4000
    )  # kB; one request's traces take 1 kB and more


@pytest.mark.timeout(150)
def test_refs_that_were_dropped_cost_no_memory(serving: Serving) -> None:
    serving(Model)

    script = """
        async def main():
            for batch in range(60):
                refs = await asyncio.gather(*[handle.remote(x) for x in range(500)])
                assert await asyncio.gather(*refs) == list(range(500))
                [millstream.ObjectRef.from_id(ref.id).done() for ref in refs]
                del refs
                if batch in (10, 59):
                    gc.collect()
                    with open("/proc/self/statm") as file:
                        seen.append(int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024)

        seen = []
        asyncio.run(main())
        say(seen[1] - seen[0])
    """

    assert int(run_script(script, engines.settings(), dev=False, timeout_s=120)) < 4000
