"""One request, from its stream entry to its outcome: verify, decode, call the method, encode what came out."""

import asyncio
import contextvars
import functools
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from millstream.broker import pickling, remote_errors
from millstream.broker.codec import REF_BYTES, Codec
from millstream.broker.link import Link
from millstream.broker.pickling import Pickled
from millstream.errors import (
    BrokerUnavailableError,
    MethodNotFoundError,
    MillstreamError,
    SerializationError,
    SignatureError,
)
from millstream.handles import arguments
from millstream.handles.context import Request, current
from millstream.replicas.attempt import SIMPLE, USUAL_FIELDS, Attempt, read_entry
from millstream.replicas.expiry import Expiry
from millstream.replicas.finisher import Finisher
from millstream.replicas.large import LargeValues
from millstream.replicas.loader import Method, Served
from millstream.replicas.pace import MOST_PROMPT, Pace
from millstream.replicas.producing import Producer
from millstream.replicas.retries import Retries
from millstream.replicas.running import InThread, Raised, Running, await_it, call_it
from millstream.replicas.streaming import Emitters
from millstream.replicas.versions import OtherVersions

log = logging.getLogger("millstream.replica")


class _Prompt(NamedTuple):
    """A method that cannot suspend, and how its requests are opened."""

    open: Callable[[bytes, bytes], Any]
    function: Callable[..., Any]


class Executor:
    """Runs attempts. The outcome of each goes to the finisher, unless it was taken away from here."""

    def __init__(
        self,
        served: Served,
        codec: Codec,
        finisher: Finisher,
        large: LargeValues,
        emitters: Emitters,
        *,
        expiry: Expiry,
        threads: int,
        where: str,
        retries: Retries,
        other_versions: OtherVersions,
    ) -> None:
        self._served, self._codec, self._finisher = served, codec, finisher
        self._large, self._emitters, self._where = large, emitters, where
        self._expiry, self.retries, self._other_versions = expiry, retries, other_versions
        self._result_of = f"a result of {codec.tag}"
        self._prompt: dict[bytes, _Prompt] = {}  # name -> method, of those that were called before and cannot suspend
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="millstream-sync")
        self.pace, self.prompt_pace = Pace(), Pace(MOST_PROMPT)  # of what runs in threads; of what cannot suspend
        self.running: dict[tuple[str, bytes], Running] = {}
        self.slot_freed = asyncio.Event()

    def start_entry(self, lane: str, entry: bytes, fields: list[bytes]) -> None:
        """Run what a stream entry asks for: to its end if it cannot suspend, else to its first suspension.

        Raises KeyError, ValueError, TypeError or RecursionError if the entry is no request, and nothing else.
        """
        # As submit writes nearly all of them; what follows is `start`, written out for methods that cannot suspend.
        if len(fields) == USUAL_FIELDS and fields[0] == b"ref" and fields[6] == b"body":
            prompt = self._prompt.get(fields[3])
            if prompt is not None and len(fields[1]) == REF_BYTES and fields[7][:2] == b"\x01p":
                self._run_promptly(prompt, lane, entry, fields)
                return
        self.start(read_entry(lane, entry, fields))

    def _run_promptly(self, prompt: "_Prompt", lane: str, entry: bytes, fields: list[bytes]) -> None:
        _, ref, _, _, _, client, _, body = fields
        try:
            args, kwargs, *model = prompt.open(ref, body)
        except Exception as e:
            self._could_not_begin(read_entry(lane, entry, fields), e)
            return
        current.set(Request(self._codec.tag, ref, model[0] if model else ""))
        try:
            coroutine = prompt.function(*args, **kwargs)
            contextvars.copy_context().run(coroutine.send, None)
        except StopIteration as returned:
            result = pickling.dump_plain(returned.value)
            if result is not None and len(result) <= pickling.LARGE_BYTES:
                self._finisher.finish(lane, entry, ref, client, b"succeeded", self._codec.seal_value(ref, result))
            else:
                self._succeeded(read_entry(lane, entry, fields), returned.value)
        except BaseException as e:
            self._raised(read_entry(lane, entry, fields), e)
        else:
            coroutine.close()
            self._suspended(read_entry(lane, entry, fields), prompt.function)

    def start(self, attempt: Attempt) -> None:
        """As `start_entry`, of one that has been read. Never raises."""
        values = None
        if attempt.more and not attempt.more.keys() <= SIMPLE and (values := attempt.small_values()) is None:
            self._start_with_care(attempt)
            return
        try:
            opened = self._codec.open("request", attempt.ref, attempt.body, attempt.method)
            method, args, kwargs, model_id = self._called(attempt, opened)
            if values:
                args, kwargs = arguments.fill_in(args, kwargs, self._large.open_small(values))
        except Exception as e:
            self._could_not_begin(attempt, e)
            return
        request = Request(self._codec.tag, attempt.ref, model_id)
        current.set(request)  # in the context of the claim loop, of which each request gets a copy
        if method.is_prompt:
            self._run_at_once(attempt, method, args, kwargs)
            return
        running = Running(attempt, request, self._loop.time())
        if method.is_async:
            self._follow(running, self._loop.create_task(await_it(method.function, args, kwargs)))
        else:
            running.job = self._threads.submit(contextvars.copy_context().run, call_it, method.function, args, kwargs)
            self._follow(running, InThread(running.job, self._loop))
        if attempt.more:
            self._notice(attempt)

    def _could_not_begin(self, attempt: Attempt, error: Exception) -> None:
        """Its arguments could not be read, or there is nothing that they could be given to."""
        if isinstance(error, MethodNotFoundError):
            self._not_here(attempt, error)
            return
        if isinstance(error, ImportError | AttributeError):
            error.add_note(f"an argument is of a class that cannot be imported where {self._codec.tag} runs")
        self._failed(attempt, error)

    def _called(self, attempt: Attempt, opened: Any) -> tuple[Method, tuple[Any, ...], dict[str, Any], str]:
        """What a request calls, with what. Raises MillstreamError or TypeError if that cannot be called so."""
        args, kwargs, *model = opened
        method = self._served.method(attempt.method)
        if method.is_generator and attempt.max_ahead is None:
            raise TypeError(
                f"method {attempt.method.decode()!r} of {self._codec.tag} is a generator; call it with "
                "handle.stream(...), or iterate over what options(stream=True).remote(...) returns"
            )
        if method.is_prompt and attempt.method not in self._prompt:
            self._prompt[attempt.method] = _Prompt(self._codec.opener("request", attempt.method), method.function)
        return method, args, kwargs, model[0] if model else ""

    # what takes more than one step

    def _start_with_care(self, attempt: Attempt) -> None:
        request = Request(self._codec.tag, attempt.ref)
        running = Running(attempt, request, self._loop.time())
        running.has_begun = False
        self._follow(running, self._loop.create_task(self._run_with_care(running)))

    async def _run_with_care(self, running: Running) -> Any:
        """A request with a deadline, a stream, large arguments, or values of others. Its slot is taken from the start."""
        attempt = running.attempt
        if (deadline_ms := attempt.deadline_ms) is not None:
            if await self._expiry.has_passed(attempt.ref, deadline_ms):
                running.is_taken = True
                return None
            running.timer = self._expiry.watch(attempt.ref, deadline_ms)
        if b"payload" in attempt.more:
            size_bytes = int(attempt.more[b"payload"])
            opened = (await self._large.read_payload(attempt.ref, attempt.method, size_bytes)).load()
        else:
            opened = self._codec.open("request", attempt.ref, attempt.body, attempt.method)
        method, args, kwargs, running.request.model_id = self._called(attempt, opened)
        if supplied := attempt.supplied:
            args, kwargs = arguments.fill_in(args, kwargs, await self._large.read_all(supplied))
        del opened
        current.set(running.request)
        self._notice(attempt)
        call = functools.partial(method.function, *args, **kwargs)
        del args, kwargs
        running.has_begun = True
        if attempt.max_ahead is not None:
            return await self._run_stream(running, call, attempt.max_ahead, is_async=method.is_async)
        if method.is_async:
            return await await_it(call, (), {})
        running.job = self._threads.submit(contextvars.copy_context().run, call_it, call, (), {})
        return await InThread(running.job, self._loop)

    async def _run_stream(self, running: Running, call: Callable[[], Any], max_ahead: int, *, is_async: bool) -> Any:
        attempt = running.attempt

        def started(job: Any) -> None:
            running.job = job

        on_stale = functools.partial(self.take_away, *attempt.place)
        is_json = attempt.body[1:2] == b"j"
        emitter = self._emitters.open(attempt.place, attempt.ref, attempt.client, max_ahead, on_stale, is_json=is_json)
        try:
            if b"attempt" in attempt.more:
                await emitter.go_on()
            return await Producer(emitter, self._threads, started).run(call, is_async=is_async)
        except (SystemExit, KeyboardInterrupt) as e:
            return Raised(e)
        finally:
            emitter.end()

    def _follow(self, running: Running, future: asyncio.Future[Any]) -> None:
        running.future = future
        self.running[running.attempt.place] = running
        future.add_done_callback(functools.partial(self._ended, running))

    def _notice(self, attempt: Attempt) -> None:
        if b"want" in attempt.more:
            self._finisher.notice(attempt.ref, attempt.client, f"{attempt.lane} ".encode() + attempt.entry)

    def _not_here(self, attempt: Attempt, error: MethodNotFoundError) -> None:
        """Its method is unknown in this version: while there are others, it is theirs."""
        running = Running(attempt, Request(self._codec.tag, attempt.ref), self._loop.time())
        self._follow(running, self._loop.create_task(self._leave_to_others(running, error)))

    async def _leave_to_others(self, running: Running, error: MethodNotFoundError) -> None:
        try:
            is_theirs = await self._other_versions.are_there()
        except BrokerUnavailableError:
            is_theirs = True  # whoever takes it next asks again
        if running.is_taken:
            return
        running.is_taken = True
        if is_theirs:
            self.retries.postpone(running.attempt)
        else:
            self._failed(running.attempt, error)

    # what others decide

    def take_away(self, lane: str, entry: bytes) -> Running | None:
        """This attempt is cancelled, timed out, or another replica's: a coroutine is cancelled, a thread told.

        Answers what still runs nevertheless, in a thread. The slot is free when it has ended.
        """
        running = self.running.get((lane, entry))
        if running is None or running.is_taken:
            return None
        running.is_taken = True
        running.request.cancel()
        self._emitters.close(running.attempt.place)
        if running.job is not None and not running.job.cancel():
            return running
        assert running.future is not None
        running.future.cancel()
        return None

    def abandon(self, running: Running) -> None:
        """Wait for it no longer: its process ends."""
        self.running.pop(running.attempt.place, None)
        self.slot_freed.set()

    def running_since(self, before: float) -> list[Running]:
        """What has been running here since before a moment on the loop's clock, and has not been taken away."""
        return [running for running in self.running.values() if running.since < before and not running.is_taken]

    def expect_flush(self) -> None:
        """Keep the outcomes of what is started now for `flush`."""
        self._finisher.expect_flush()

    def flush(self, over: Link) -> None:
        """Send the outcomes of what has just been started and has ended already, ahead of what is sent there next."""
        self._finisher.flush(over)

    def close(self) -> None:
        """Cancel what still runs, without an outcome: it runs elsewhere. A thread in user code ends with the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for running in self.running.values():
            running.is_taken = True
            if running.future is not None:
                running.future.cancel()

    def holds(self, lane: str, entry: bytes) -> bool:
        """Is this entry running here, or ended here with the server not yet knowing?"""
        return (lane, entry) in self.running or self._finisher.holds(lane, entry) or self.retries.holds(lane, entry)

    def hand_back_unstarted(self) -> list[tuple[str, bytes]]:
        """Take back what waits for a thread: (lane, entry) of each, which will not run here."""
        unstarted = []
        for place, running in list(self.running.items()):
            if running.job is not None and running.job.cancel():
                running.is_taken = True
                assert running.future is not None
                running.future.cancel()
                del self.running[place]
                unstarted.append(place)
        self.slot_freed.set()
        return unstarted

    def _run_at_once(self, attempt: Attempt, method: Method, args: Any, kwargs: Any) -> None:
        try:
            coroutine = method.function(*args, **kwargs)
            contextvars.copy_context().run(coroutine.send, None)
        except StopIteration as returned:
            self._succeeded(attempt, returned.value)
        except BaseException as e:
            self._raised(attempt, e)
        else:
            coroutine.close()
            self._suspended(attempt, method.function)

    def _suspended(self, attempt: Attempt, function: Any) -> None:
        """What was called is no coroutine of the code that was looked at."""
        self._failed(attempt, RuntimeError(f"{function!r} suspended where its code cannot"))

    # the end

    def _ended(self, running: Running, done: asyncio.Future[Any]) -> None:
        if running.timer is not None:
            running.timer.cancel()
        if running.job is not None:
            self.pace.ended(running.since, self._loop.time())
        self.running.pop(running.attempt.place, None)
        self.slot_freed.set()
        attempt = running.attempt
        if running.is_taken:
            if not done.cancelled():
                done.exception()  # retrieved: nobody asks for it
        elif done.cancelled():
            self._raised(attempt, asyncio.CancelledError())
        elif (error := done.exception()) is not None:
            if running.has_begun:
                self._raised(attempt, error)
            elif isinstance(error, MethodNotFoundError):
                self._not_here(attempt, error)
            else:
                self._failed(attempt, error)
        else:
            result = done.result()
            if isinstance(result, Raised):
                self._raised(attempt, result.error)
            else:
                self._succeeded(attempt, result)

    def _succeeded(self, attempt: Attempt, value: Any) -> None:
        try:
            if attempt.body[1:2] == b"j":
                envelope = self._seal_json(attempt, value)
            else:
                body = pickling.dump_parts(value, self._result_of)
                if isinstance(body, Pickled):
                    self._finish_large(attempt, body)
                    return
                envelope = self._codec.seal("value", attempt.ref, body)
        except Exception as e:
            self._failed(attempt, _explained(e, value, self._result_of))
            return
        self._finisher.finish(attempt.lane, attempt.entry, attempt.ref, attempt.client, b"succeeded", envelope)

    def _finish_large(self, attempt: Attempt, body: Pickled) -> None:
        """Write the value under a key of its own, then finish. The slot stays taken."""
        body = body.snapshot()  # it may be the deployment's own array, and the next request change it
        running = Running(attempt, Request(self._codec.tag, attempt.ref), self._loop.time())
        writing = self._loop.create_task(self._large.write_value(attempt.ref, attempt.entry.decode(), body))
        running.future, self.running[attempt.place] = writing, running
        self._notice(attempt)  # what ran at once has not said so: the result would have

        def written(done: asyncio.Future[bytes]) -> None:
            self.running.pop(attempt.place, None)
            self.slot_freed.set()
            if running.is_taken or done.cancelled():
                self._finisher.forget_value(attempt.ref, attempt.entry)
                return
            if (error := done.exception()) is not None:
                self._failed(attempt, error)
            else:
                self._finisher.finish(
                    attempt.lane, attempt.entry, attempt.ref, attempt.client, b"succeeded", done.result()
                )

        writing.add_done_callback(written)

    def value_was_lost(self, lane: str, entry: bytes, ref: bytes, client: bytes) -> None:
        """The server has lost a large value between its writing and the finish: then the request has failed."""
        error = MillstreamError(
            "the server lost the value before it could be announced: it is out of memory and evicts, or was emptied; "
            "see that its maxmemory-policy is noeviction"
        )
        self._failed(Attempt(lane, entry, ref, b"", client, b"", {}), error)

    def _seal_json(self, attempt: Attempt, value: Any) -> bytes:
        """Who asks in JSON is answered in JSON."""
        try:
            return self._codec.seal_json("value", attempt.ref, value)
        except (TypeError, ValueError) as e:
            raise SerializationError(
                f"{self._result_of} cannot be written as JSON, as its caller wants it: {e}"
            ) from None

    def _raised(self, attempt: Attempt, error: BaseException) -> None:
        """Its own code raised: it is tried again, if its caller or its deployment wants that, or it has failed."""
        if not self.retries.takes(attempt, error):
            self._failed(attempt, error, where=self._where + (f", retry {tried}" if (tried := attempt.retries) else ""))

    def _failed(self, attempt: Attempt, error: BaseException, where: str = "") -> None:
        if isinstance(error, SignatureError) and not where:  # none of its own code has run
            log.error("an attempt at %s in lane %s was refused: %s", _name_of(attempt), attempt.lane, error)
        where = where or self._where
        if attempt.body[1:2] == b"j":  # a body of any length: it may be what is wrong
            envelope = self._codec.seal_json("error", attempt.ref, remote_errors.describe(error, where=where))
        else:
            request = f"{self._codec.tag}~{_name_of(attempt)}"
            record = remote_errors.capture(error, where=where, request=request)
            envelope = self._codec.seal("error", attempt.ref, record)
        self._finisher.finish(attempt.lane, attempt.entry, attempt.ref, attempt.client, b"failed", envelope)


def _name_of(attempt: Attempt) -> str:
    """Its ref, which may be any bytes before its signature was verified."""
    return attempt.ref[:100].decode(errors="replace")


def _explained(error: Exception, value: Any, result_of: str) -> Exception:
    """Why a result cannot be sent: a generator that was not asked for as a stream is no question of pickling."""
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        return TypeError(
            f"{result_of} is a generator; call the method with handle.stream(...), or options(stream=True)"
        )
    return error
