"""Waiting on asyncio's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from casemate import _core
from casemate._compat._aio_background import Background, Mailbox
from casemate._compat._aio_channel import Channel, Slot
from casemate.errors import AgentConnectionError

if TYPE_CHECKING:
    from _typeshed import HasFileno

__all__ = [
    "AgentConnection",
    "Background",
    "Channel",
    "Later",
    "Lock",
    "Mailbox",
    "Reply",
    "Slot",
    "shielded",
    "to_thread",
    "wait_readable",
]

T = TypeVar("T")
P = ParamSpec("P")

Lock = asyncio.Lock

# What a step gives once it was waited for; the blocking face has it at once.
Later = Awaitable[T]


async def to_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a pool thread."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def shielded(work: Coroutine[Any, Any, T]) -> T:
    """Finish ``work`` even when the caller is cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        task.exception()
        raise cancelled
    return task.result()


async def wait_readable(fds: Sequence[int], deadline: float | None) -> list[int]:
    """Those of ``fds`` that can be read, at least one; empty at the deadline."""
    loop = asyncio.get_running_loop()
    changed: asyncio.Future[None] = loop.create_future()
    ready: list[int] = []

    def readable(original: int) -> None:
        if original not in ready:
            ready.append(original)
        if not changed.done():
            changed.set_result(None)

    copies = []
    try:
        for fd in fds:
            # The loop knows one reader a descriptor: a copy leaves others' readers alone.
            copy = os.dup(fd)
            copies.append(copy)
            loop.add_reader(copy, readable, fd)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(_loop_time(loop, deadline)):
                await changed
    finally:
        for copy in copies:
            loop.remove_reader(copy)
            os.close(copy)
    return ready


class _Answer:
    """The place of one answer. Tasks wait on it by the protocol of futures.

    A future would wake its task in the loop's next round, behind one more look at all descriptors; this one wakes it in the very
    call in which the loop's reader found the answer.
    """

    __slots__ = ("_asyncio_future_blocking", "_callbacks", "_connection", "_slot", "outcome", "timer")

    def __init__(self, connection: AgentConnection, slot: int, timer: asyncio.TimerHandle | None) -> None:
        self._asyncio_future_blocking = False
        self._callbacks: tuple[tuple[Callable[[Any], object], contextvars.Context | None], ...] = ()
        self._connection = connection
        self._slot = slot
        self.timer = timer
        self.outcome: bytes | BaseException | None = None

    def __await__(self) -> Generator[Any, None, bytes]:
        outcome = self.outcome
        if outcome is None:
            self._asyncio_future_blocking = True
            yield self
            outcome = self.outcome
        return outcome if type(outcome) is bytes else self.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the tasks that may wait."""
        return self._connection._loop

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self.outcome is not None

    def result(self) -> bytes:
        """The answer. Raises: what it carries; InvalidStateError while there is none."""
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if self.outcome is None:
            raise asyncio.InvalidStateError("there is no answer yet")
        return self.outcome

    def cancel(self, msg: object = None) -> bool:
        """Give up: the request is forgotten, who waits is cancelled. False when the outcome is known."""
        if self.outcome is not None:
            return False
        self._connection._forget(self._slot)
        self.outcome = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        self.wake_soon()
        return True

    def add_done_callback(
        self, callback: Callable[[Any], object], *, context: contextvars.Context | None = None
    ) -> None:
        """Call ``callback`` when the outcome is known."""
        self._callbacks = (*self._callbacks, (callback, context))
        if self.outcome is not None:
            self.wake_soon()

    def remove_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Do not call ``callback`` any more."""
        self._callbacks = tuple(one for one in self._callbacks if one[0] != callback)

    def wake(self) -> None:
        """Run who waits, here and now. Only for callbacks of the loop: no task may be running."""
        callbacks, self._callbacks = self._callbacks, ()
        for callback, context in callbacks:
            if context is None:
                callback(self)
            else:
                context.run(callback, self)

    def wake_soon(self) -> None:
        """Let the loop run who waits."""
        callbacks, self._callbacks = self._callbacks, ()
        for callback, context in callbacks:
            self.get_loop().call_soon(callback, self, context=context)


class Reply:
    """The answer of one request that is under way."""

    __slots__ = ("_answer", "slot")

    def __init__(self, slot: int, answer: _Answer) -> None:
        self._answer = answer
        self.slot = slot

    async def result(self) -> bytes:
        """The answer. A cancelled wait forgets the request. Raises: what the answer carries."""
        return await self._answer

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return self._answer.outcome is not None

    def cancel(self) -> None:
        """Forget the request; a late answer is dropped."""
        self._answer.cancel()


class AgentConnection:
    """An agent connection served by the running loop: the loop's own thread runs the codec."""

    def __init__(self, take_fd: int, watch: HasFileno | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._native = _core.Connection(take_fd, watch=watch)
        self._fd = self._native.fileno()
        self._answers: dict[int, _Answer] = {}
        self._watch_fd = -1
        self._writing = False
        self._loop.add_reader(self._fd, self._readable)
        if watch is not None:
            self._watch_fd = os.dup(watch.fileno())
            self._loop.add_reader(self._watch_fd, self._watched_ended)

    def submit(self, service: str, method: str, request: bytes, timeout_s: float | None) -> Reply:
        """Send a JSON request. Does not wait."""
        return self._await(self._native.submit(service, method, request, timeout_s=timeout_s), timeout_s)

    async def call(self, service: str, method: str, request: bytes, timeout_s: float | None) -> bytes:
        """Send a JSON request and wait for its answer. Raises: what the answer carries."""
        slot = self._native.submit(service, method, request, timeout_s=timeout_s)
        return await self._place(slot, timeout_s)

    async def call_raw(self, service: str, method: str, request: bytes, timeout_s: float | None) -> bytes:
        """As :meth:`call` for a protobuf message, as its answer is one."""
        slot = self._native.submit_raw(service, method, request, timeout_s=timeout_s)
        return await self._place(slot, timeout_s)

    def submit_raw(self, service: str, method: str, request: bytes, timeout_s: float | None) -> Reply:
        """Send a request that is a protobuf message already, as its answer will be. Does not wait."""
        return self._await(self._native.submit_raw(service, method, request, timeout_s=timeout_s), timeout_s)

    def submit_write_stdin(
        self, container_id: str, exec_id: str, data: bytes, timeout_s: float | None
    ) -> Reply:
        """Send WriteStdin. Does not wait."""
        slot = self._native.submit_write_stdin(container_id, exec_id, data, timeout_s=timeout_s)
        return self._await(slot, timeout_s)

    def submit_read(self, container_id: str, exec_id: str, length: int, stderr: bool) -> Reply:
        """Send ReadStdout or ReadStderr. Does not wait."""
        return self._await(self._native.submit_read(container_id, exec_id, length, stderr=stderr), None)

    async def wait_any(self, replies: Sequence[Reply], timeout_s: float | None = None) -> list[Reply]:
        """Those that are done, at least one; empty at ``timeout_s``."""
        done = [reply for reply in replies if reply.done()]
        if done:
            return done
        changed: asyncio.Future[None] = self._loop.create_future()

        def wake(_: object) -> None:
            if not changed.done():
                changed.set_result(None)

        timer = None if timeout_s is None else self._loop.call_later(timeout_s, wake, None)
        for reply in replies:
            reply._answer.add_done_callback(wake)
        try:
            await changed
        finally:
            for reply in replies:
                reply._answer.remove_done_callback(wake)
            if timer is not None:
                timer.cancel()
        return [reply for reply in replies if reply.done()]

    @property
    def closed(self) -> bool:
        """Whether the connection is closed or broken."""
        return self._native.closed

    def fail(self, text: str) -> None:
        """Break it: open requests end with AgentConnectionError, later ones are refused. Idempotent."""
        self._end(text)

    def close(self) -> None:
        """Close; open requests end with AgentConnectionError. Idempotent."""
        self._end("the connection to the agent was closed")
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            if self._writing:
                self._loop.remove_writer(self._fd)
                self._writing = False
            self._fd = -1
            self._native.close()

    def _await(self, slot: int, timeout_s: float | None) -> Reply:
        return Reply(slot, self._place(slot, timeout_s))

    def _place(self, slot: int, timeout_s: float | None) -> _Answer:
        timer = None if timeout_s is None else self._loop.call_later(timeout_s + 0.001, self._readable)
        answer = self._answers[slot] = _Answer(self, slot, timer)
        if not self._writing and self._native.wants_write:
            self._loop.add_writer(self._fd, self._writable)
            self._writing = True
        return answer

    def _forget(self, slot: int) -> None:
        answer = self._answers.pop(slot, None)
        if answer is not None:
            self._native.cancel(slot)
            if answer.timer is not None:
                answer.timer.cancel()

    def _writable(self) -> None:
        self._native.on_writable()
        if not self._native.wants_write:
            self._loop.remove_writer(self._fd)
            self._writing = False

    def _readable(self) -> None:
        finished = self._native.on_readable()
        # A broken connection ends its open requests, the last of them last; without any nothing is finished.
        if (not finished or type(finished[-1][1]) is not bytes) and self._native.closed:
            self._stop_watching()
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
        if len(finished) == 1:
            answer = self._settle(*finished[0])
            if answer is not None:
                answer.wake()
            return
        answers = deque(self._settle(slot, outcome) for slot, outcome in finished)
        try:
            while answers:
                answer = answers.popleft()
                if answer is not None:
                    answer.wake()
        finally:
            # What a task raised that ends the loop must not keep the others from being told.
            for answer in answers:
                if answer is not None:
                    answer.wake_soon()

    def _watched_ended(self) -> None:
        self._end("the virtual machine ended")

    def _end(self, text: str) -> None:
        # First, since it refuses in a fork, where the loop's own descriptors are the parent's.
        failed = self._native.fail(text)
        self._stop_watching()
        for slot in failed:
            answer = self._settle(slot, AgentConnectionError(text))
            if answer is not None:
                answer.wake_soon()

    def _stop_watching(self) -> None:
        if self._watch_fd >= 0:
            self._loop.remove_reader(self._watch_fd)
            os.close(self._watch_fd)
            self._watch_fd = -1

    def _settle(self, slot: int, outcome: bytes | BaseException) -> _Answer | None:
        """Give the answer its outcome; None when nobody wants it any more."""
        answer = self._answers.pop(slot, None)
        if answer is None:
            return None
        if answer.timer is not None:
            answer.timer.cancel()
        answer.outcome = outcome
        return answer


def _loop_time(loop: asyncio.AbstractEventLoop, deadline: float | None) -> float | None:
    return None if deadline is None else loop.time() + max(deadline - time.monotonic(), 0.0)
