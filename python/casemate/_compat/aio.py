"""Waiting on asyncio's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from casemate import _core
from casemate._compat._aio_channel import Channel, Slot
from casemate.errors import AgentConnectionError

if TYPE_CHECKING:
    from _typeshed import HasFileno

__all__ = [
    "AgentConnection",
    "Channel",
    "Later",
    "Lock",
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


class Reply:
    """The answer of one request that is under way."""

    __slots__ = ("_connection", "_future", "slot")

    def __init__(self, connection: AgentConnection, slot: int, future: asyncio.Future[bytes]) -> None:
        self._connection = connection
        self._future = future
        self.slot = slot

    async def result(self) -> bytes:
        """The answer. A cancelled wait forgets the request. Raises: what the answer carries."""
        try:
            return await self._future
        except asyncio.CancelledError:
            self.cancel()
            raise

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return self._future.done()

    def cancel(self) -> None:
        """Forget the request; a late answer is dropped."""
        self._connection.forget(self.slot)


class AgentConnection:
    """An agent connection served by the running loop: the loop's own thread runs the codec."""

    def __init__(self, take_fd: int, watch: HasFileno | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._native = _core.Connection(take_fd, watch=watch)
        self._fd = self._native.fileno()
        self._replies: dict[int, tuple[asyncio.Future[bytes], asyncio.TimerHandle | None]] = {}
        self._watch_fd = -1
        self._writing = False
        self._loop.add_reader(self._fd, self._readable)
        if watch is not None:
            self._watch_fd = os.dup(watch.fileno())
            self._loop.add_reader(self._watch_fd, self._watched_ended)

    def submit(self, service: str, method: str, request: bytes, timeout_s: float | None) -> Reply:
        """Send a JSON request. Does not wait."""
        return self._await(self._native.submit(service, method, request, timeout_s=timeout_s), timeout_s)

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
        futures = [reply._future for reply in replies]
        await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return [reply for reply in replies if reply.done()]

    def forget(self, slot: int) -> None:
        """Forget a request."""
        entry = self._replies.pop(slot, None)
        if entry is not None:
            self._native.cancel(slot)
            future, timer = entry
            if timer is not None:
                timer.cancel()
            future.cancel()

    @property
    def closed(self) -> bool:
        """Whether the connection is closed or broken."""
        return self._native.closed

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
        future: asyncio.Future[bytes] = self._loop.create_future()
        timer = None if timeout_s is None else self._loop.call_later(timeout_s + 0.001, self._readable)
        self._replies[slot] = (future, timer)
        self._watch_writes()
        return Reply(self, slot, future)

    def _watch_writes(self) -> None:
        if self._native.wants_write and not self._writing:
            self._loop.add_writer(self._fd, self._writable)
            self._writing = True

    def _writable(self) -> None:
        self._native.on_writable()
        if not self._native.wants_write:
            self._loop.remove_writer(self._fd)
            self._writing = False

    def _readable(self) -> None:
        for slot, outcome in self._native.on_readable():
            self._finish(slot, outcome)
        if self._native.closed:
            self._stop_watching()
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)

    def _watched_ended(self) -> None:
        self._end("the virtual machine ended")

    def _end(self, text: str) -> None:
        self._stop_watching()
        for slot in self._native.fail(text):
            self._finish(slot, AgentConnectionError(text))

    def _stop_watching(self) -> None:
        if self._watch_fd >= 0:
            self._loop.remove_reader(self._watch_fd)
            os.close(self._watch_fd)
            self._watch_fd = -1

    def _finish(self, slot: int, outcome: bytes | BaseException) -> None:
        entry = self._replies.pop(slot, None)
        if entry is None:
            return
        future, timer = entry
        if timer is not None:
            timer.cancel()
        if future.done():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
            # Whoever drops a reply on purpose (a closed sandbox) must not be told of it by the loop.
            future.exception()
        else:
            future.set_result(outcome)


def _loop_time(loop: asyncio.AbstractEventLoop, deadline: float | None) -> float | None:
    return None if deadline is None else loop.time() + max(deadline - time.monotonic(), 0.0)
