"""One request, from its stream entry to its outcome: verify, decode, call the method, encode what came out."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from millstream.broker import pickling, remote_errors
from millstream.broker.codec import Codec, codec_for
from millstream.broker.keys import split_ref
from millstream.broker.outcomes import open_stored
from millstream.config import Settings
from millstream.errors import SerializationError
from millstream.handles import arguments
from millstream.replicas.finisher import Finisher
from millstream.replicas.loader import Method, Served

JSON = ord("j")  # the form byte of an envelope


class Attempt(NamedTuple):
    """One stream entry in the hands of this replica."""

    lane: str
    entry: bytes
    ref: bytes
    method: bytes
    client: bytes
    body: bytes
    want: bytes
    supplied: dict[str, bytes]  # ref id -> stored value, of the refs among its arguments


def read_entry(lane: str, entry: bytes, fields: list[bytes]) -> Attempt:
    """From the fields of a stream entry. Raises KeyError if it is not a request."""
    if len(fields) == 8 and fields[0] == b"ref" and fields[6] == b"body":  # as submit writes it
        return Attempt(lane, entry, fields[1], fields[3], fields[5], fields[7], b"", {})
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    supplied = {name[4:].decode(): value for name, value in named.items() if name[:4] == b"dep:"}
    want = named.get(b"want", b"")
    return Attempt(lane, entry, named[b"ref"], named[b"method"], named[b"reply"], named[b"body"], want, supplied)


class Executor:
    """Runs attempts. `on_end` is called once for each, after its outcome was handed to the finisher."""

    def __init__(
        self, served: Served, codec: Codec, settings: Settings, finisher: Finisher, threads: int, where: str
    ) -> None:
        self._served, self._codec, self._settings = served, codec, settings
        self._finisher, self._where = finisher, where
        self._result_of = f"a result of {codec.tag}"
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="millstream-sync")
        self.running: dict[tuple[str, bytes], asyncio.Future[Any] | None] = {}
        self.slot_freed = asyncio.Event()

    def start(self, attempt: Attempt) -> None:
        """Run one attempt: to its end if it cannot suspend, else to its first suspension. Never raises."""
        try:
            args, kwargs = self._codec.open("request", attempt.ref, attempt.body, attempt.method)
            if attempt.supplied:
                values = {ref_id: self._open_value(ref_id, stored) for ref_id, stored in attempt.supplied.items()}
                args, kwargs = arguments.fill_in(args, kwargs, values)
            method = self._served.method(attempt.method)
        except Exception as e:
            self._failed(attempt, e)
            return
        if method.is_prompt:
            self._run_at_once(attempt, method, args, kwargs)
        else:
            self._run_later(attempt, method, args, kwargs)

    def close(self) -> None:
        """Let idle threads go; a thread still running user code ends with the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def holds(self, lane: str, entry: bytes) -> bool:
        """Is this entry running here, or ended here with the server not yet knowing?"""
        return (lane, entry) in self.running or self._finisher.holds(lane, entry)

    def hand_back_unstarted(self) -> list[tuple[str, bytes]]:
        """Take back what waits for a thread: (lane, entry) of each, which will not run here."""
        unstarted = []
        for place, future in list(self.running.items()):
            if isinstance(future, _InThread) and future.job.cancel():
                del self.running[place]
                unstarted.append(place)
        self.slot_freed.set()
        return unstarted

    def _open_value(self, ref_id: str, stored: bytes) -> Any:
        tag, ref = split_ref(ref_id)
        return open_stored(codec_for(self._settings.secret_key, self._settings.namespace, tag), ref.encode(), stored)

    def _run_at_once(self, attempt: Attempt, method: Method, args: Any, kwargs: Any) -> None:
        try:
            coroutine = method.function(*args, **kwargs)
            contextvars.copy_context().run(coroutine.send, None)
        except StopIteration as returned:
            self._succeeded(attempt, returned.value)
        except BaseException as e:
            self._failed(attempt, e)
        else:  # its code cannot suspend, so this is no coroutine of ours
            coroutine.close()
            self._failed(attempt, RuntimeError(f"{method.function!r} suspended where its code cannot"))

    def _run_later(self, attempt: Attempt, method: Method, args: Any, kwargs: Any) -> None:
        future: asyncio.Future[Any]
        if method.is_async:
            future = self._loop.create_task(_await(method.function, args, kwargs))
        else:
            context = contextvars.copy_context()
            job = self._threads.submit(context.run, _call, method.function, args, kwargs)
            future = _InThread(job, self._loop)
        self.running[attempt.lane, attempt.entry] = future
        future.add_done_callback(lambda done: self._ended(attempt, done))
        if attempt.want:
            self._finisher.notice(attempt.ref, attempt.client, f"{attempt.lane} ".encode() + attempt.entry)

    def _ended(self, attempt: Attempt, done: asyncio.Future[Any]) -> None:
        if self.running.pop((attempt.lane, attempt.entry), done) is not done:
            return
        self.slot_freed.set()
        if done.cancelled():
            self._failed(attempt, asyncio.CancelledError())
        elif (error := done.exception()) is not None:
            self._failed(attempt, error)
        else:
            result = done.result()
            if isinstance(result, _Raised):
                self._failed(attempt, result.error)
            else:
                self._succeeded(attempt, result)

    def _succeeded(self, attempt: Attempt, value: Any) -> None:
        try:
            if attempt.body[1] == JSON:
                envelope = self._seal_json(attempt, value)
            else:
                envelope = self._codec.seal("value", attempt.ref, pickling.dump(value, self._result_of))
        except Exception as e:
            self._failed(attempt, e)
            return
        self._finisher.finish(attempt.lane, attempt.entry, attempt.ref, attempt.client, b"succeeded", envelope)

    def _seal_json(self, attempt: Attempt, value: Any) -> bytes:
        """Who asks in JSON is answered in JSON."""
        try:
            return self._codec.seal_json("value", attempt.ref, value)
        except (TypeError, ValueError) as e:
            raise SerializationError(
                f"{self._result_of} cannot be written as JSON, as its caller wants it: {e}"
            ) from None

    def _failed(self, attempt: Attempt, error: BaseException) -> None:
        if attempt.body[1:2] == b"j":  # a body of any length: it may be what is wrong
            envelope = self._codec.seal_json("error", attempt.ref, remote_errors.describe(error, where=self._where))
        else:
            envelope = self._codec.seal("error", attempt.ref, remote_errors.capture(error, where=self._where))
        self._finisher.finish(attempt.lane, attempt.entry, attempt.ref, attempt.client, b"failed", envelope)


class _Raised(NamedTuple):
    """What a method raised: a StopIteration cannot travel through a future, and a SystemExit in a task ends the loop."""

    error: BaseException


async def _await(function: Any, args: Any, kwargs: Any) -> Any:
    try:
        return await function(*args, **kwargs)
    except (SystemExit, KeyboardInterrupt) as e:
        return _Raised(e)


def _call(function: Any, args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except BaseException as e:
        return _Raised(e)


class _InThread(asyncio.Future[Any]):
    """The loop's view of a call in a thread."""

    def __init__(self, job: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.job = job
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._copy))

    def _copy(self) -> None:
        if not self.done() and not self.job.cancelled():
            self.set_result(self.job.result())
