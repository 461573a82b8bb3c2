"""`make demo`, for real and with fewer requests."""

import re
import signal
from collections.abc import Callable

import pytest

from tests.examples.program import Program

pytestmark = [pytest.mark.anyio, pytest.mark.processes, pytest.mark.timeout(180)]

DEMO = ("-m", "examples.digits")
A_FEW = ("--requests", "300", "--seconds", "5")
MANY = ("--requests", "3000", "--seconds", "20")


async def test_demo_goes_from_zero_to_several_and_back(run: Callable[..., Program]) -> None:
    demo = run(*DEMO, *A_FEW)

    exit_code = await demo.ends(timeout_s=150.0)

    assert exit_code == 0, demo.output
    assert find(r"answers +([\d,]+)", demo) == "300"
    assert float(find(r"([\d.]+)% correct\s*\n +throughput", demo)) > 90
    first, most, last = re.findall(r"\d+", find(r"replicas +(0 → \d+ → \d+)", demo))
    assert (first, last) == ("0", "0") and int(most) >= 4
    assert demo.left_behind() == set()
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.parametrize("moment", ["starting", " 0 of 3,000 answered", "Classify 4"])
async def test_ctrl_c_ends_all_in_order(run: Callable[..., Program], moment: str) -> None:
    demo = run(*DEMO, *MANY)
    await demo.says(moment)

    demo.send(signal.SIGINT)

    assert await demo.ends() == 128 + signal.SIGINT
    assert demo.output.endswith("interrupted\nstopping what was started\n"), demo.output
    assert "Traceback" not in demo.output
    assert demo.left_behind() == set()
    assert list(demo.temporary.iterdir()) == []


async def test_kill_leaves_nothing_behind(run: Callable[..., Program]) -> None:
    demo = run(*DEMO, *MANY)
    await demo.says("Classify 4")

    demo.send(signal.SIGKILL)

    await demo.ends()
    assert demo.left_behind(timeout_s=30.0) == set()
    assert list(demo.temporary.iterdir()) == []


def find(pattern: str, demo: Program) -> str:
    match = re.search(pattern, demo.output)
    assert match is not None, f"no {pattern!r} in:\n{demo.output}"
    return match[1]
