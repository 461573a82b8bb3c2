"""The web application, served by uvicorn and asked over HTTP."""

import signal
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import Request

from examples.digits.images import scan_all
from examples.fastapi_app.main import answer_error
from millstream.errors import BackPressureError, DeploymentNotFoundError, GetTimeoutError, RefNotFoundError
from tests.examples.program import Program
from tests.servers import free_port

pytestmark = pytest.mark.anyio

SCANS = [({"pixels": scan.tolist()}, digit) for scan, digit in scan_all(40)]


@pytest.fixture
async def web(run: Callable[..., Program]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running application; it is interrupted at the end, and must leave nothing behind."""
    port = free_port()
    program = run("-m", "uvicorn", "examples.fastapi_app.main:app", "--port", str(port))
    await program.says("Application startup complete")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    program.send(signal.SIGINT)
    await program.ends()
    assert "Traceback" not in program.output, program.output
    assert program.left_behind() == set()


@pytest.mark.processes
@pytest.mark.timeout(120)
async def test_it_reads_digits_and_tells_what_went_wrong(web: httpx.AsyncClient) -> None:
    """One test for all endpoints: it is the start that takes time."""
    scan, _ = SCANS[0]

    one = await web.post("/digit", json=(await web.get("/example")).json())
    assert one.status_code == 200 and one.json()["digit"] in range(10)

    many = await web.post("/digits", json=[scan for scan, _ in SCANS])
    right = [read == digit for read, (_, digit) in zip(many.json()["digits"], SCANS, strict=True)]
    assert sum(right) >= 0.8 * len(right)

    later = await web.post("/digit/later", json=scan)
    assert later.status_code == 202
    found = await web.get(f"/results/{later.json()['ref']}")
    assert found.json() == {"digit": many.json()["digits"][0]}

    wrong = await web.post("/digit", json={"pixels": [[1, 2], [3, 4]]})
    assert (wrong.status_code, wrong.json()) == (422, {"detail": "ValueError: a scan has 8 x 8 pixels, this has 2 x 2"})
    no_ref = await web.get("/results/nothing")
    assert no_ref.status_code == 422
    unknown = await web.get(f"/results/{later.json()['ref'][:-4]}AAAA")
    assert unknown.status_code == 404


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BackPressureError("the queue is full"), 503),
        (DeploymentNotFoundError("there is none"), 503),
        (GetTimeoutError("no result yet"), 504),
        (TimeoutError(), 504),  # asyncio's has nothing to say
        (RefNotFoundError("it expired"), 404),
    ],
)
async def test_each_error_has_its_status(error: Exception, status: int) -> None:
    response = await answer_error(Request({"type": "http"}), error)

    assert response.status_code == status
    assert bytes(response.body).decode() == f'{{"detail":"{str(error) or type(error).__name__}"}}'
    assert ("retry-after" in response.headers) == (status == 503)
