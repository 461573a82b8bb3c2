"""Handles inside a FastAPI application: the web server awaits, replicas work.

    uvicorn examples.fastapi_app.main:app                                     # from the root of the repository
    curl -s localhost:8000/example | curl --json @- localhost:8000/digit      # -> {"digit":8}

This one brings its replicas along, as suits development. In production they run elsewhere, with
`millstream run examples.digits.app:app`; the web servers find them through MILLSTREAM_URL and leave out `serve.run`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from examples.digits.app import app as digits_app
from examples.digits.images import Image, scan_all
from millstream import ObjectRef, serve
from millstream.errors import (
    BackPressureError,
    BrokerUnavailableError,
    DeployFailedError,
    DeploymentNotFoundError,
    RefNotFoundError,
)

PATIENCE_S = 20.0  # how long a browser is kept waiting; enough for the first request, which starts the replicas

digits = serve.get_deployment_handle("Digits", "digits")  # a name: nothing is sent, so it may stand here


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await asyncio.to_thread(serve.run, digits_app, name="digits")  # in a thread, because it blocks
    yield
    await asyncio.to_thread(serve.shutdown)


app = FastAPI(title="Digits", lifespan=lifespan)


class Scan(BaseModel):
    """Eight rows of eight pixels, from 0 (paper) to 16 (ink)."""

    pixels: list[list[float]]

    def image(self) -> Image:
        return np.array(self.pixels)


@app.get("/example")
async def example() -> Scan:
    """A scan to try the others with."""
    scan, _ = next(scan_all(1))
    return Scan(pixels=scan.tolist())


@app.post("/digit")
async def read_digit(scan: Scan) -> dict[str, int]:
    """The usual case: one await, from the request to its value."""
    async with asyncio.timeout(PATIENCE_S):
        return {"digit": await digits.call(scan.image())}


@app.post("/digits")
async def read_digits(scans: list[Scan]) -> dict[str, list[int]]:
    """Many at once: they are spread over the replicas there are, and more are started if they are many."""
    async with asyncio.timeout(PATIENCE_S):
        return {"digits": await asyncio.gather(*[digits.call(scan.image()) for scan in scans])}


@app.post("/digit/later", status_code=202)
async def read_later(scan: Scan) -> dict[str, str]:
    """For what takes long: answer with the ref's id as soon as the request is safe in Redis."""
    ref = await digits.options(block_until="queued").remote(scan.image())
    return {"ref": ref.id}


@app.get("/results/{ref_id}")
async def result(ref_id: str) -> dict[str, int]:
    """Its result, asked of any web server: the id is all it takes."""
    async with asyncio.timeout(PATIENCE_S):
        return {"digit": await ObjectRef.from_id(ref_id)}


STATUS_OF = {
    ValueError: 422,  # raised by a deployment, in another process, and still a ValueError here
    RefNotFoundError: 404,  # unknown, or its result has expired
    TimeoutError: 504,  # ours, asyncio's, and millstream's GetTimeoutError and RequestTimeoutError
    BackPressureError: 503,  # the queue is full
    BrokerUnavailableError: 503,
    DeployFailedError: 503,
    DeploymentNotFoundError: 503,  # not deployed (yet)
}


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    status = next(STATUS_OF[cls] for cls in type(error).__mro__ if cls in STATUS_OF)
    detail = str(error).strip().split("\n")[-1]  # of a remote traceback, the line that says what it was
    return JSONResponse(
        {"detail": detail or type(error).__name__}, status, {"Retry-After": "1"} if status == 503 else None
    )


for kind in STATUS_OF:
    app.add_exception_handler(kind, answer_error)
