"""A socket that many wait on at once, on asyncio's event loop: the loop's own thread reads and hands out what came."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from casemate.errors import DeadlineExceededError

__all__ = ["Channel", "Slot"]

_RECEIVE_BYTES = 65536


class Slot:
    """A place for one result."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def resolve(self, value: Any) -> None:
        """Give the result; a second one is dropped."""
        if not self._future.done():
            self._future.set_result(value)

    def fail(self, error: BaseException) -> None:
        """End with ``error``; dropped when there is a result."""
        if not self._future.done():
            self._future.set_exception(error)
            # One that nobody waits on any more must not be told of by the loop.
            self._future.exception()

    def done(self) -> bool:
        """Whether :meth:`Channel.wait` would not wait."""
        return self._future.done()


def _finish(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_result(None)


class Channel:
    """A connected stream socket whose bytes go to ``on_bytes``, and its end, once, to ``on_end``.

    Both are called with nothing else of the channel's owner running. ``on_end`` gets what ``on_bytes`` raised, the system's
    error, or None at the end of the stream or after :meth:`close`. Owns the socket.
    """

    __slots__ = ("_ended", "_loop", "_on_bytes", "_on_end", "_send_lock", "_socket")

    def __init__(
        self,
        take_socket: socket.socket,
        on_bytes: Callable[[bytes], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        take_socket.setblocking(False)
        self._socket = take_socket
        self._on_bytes = on_bytes
        self._on_end = on_end
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._send_lock = asyncio.Lock()
        self._loop.add_reader(take_socket.fileno(), self._readable)

    @property
    def ended(self) -> bool:
        """Whether nothing more is sent or read."""
        return self._ended

    async def send(
        self, make: Callable[[], bytes], deadline: float | None, borrow_fds: Sequence[int] = ()
    ) -> None:
        """Send what ``make`` gives, with descriptors beside its first byte. A send that fails ends the channel.

        Raises:
            DeadlineExceededError: The peer takes nothing; OSError.
        """
        async with self._send_lock:
            data = make()
            try:
                async with asyncio.timeout_at(_loop_time(self._loop, deadline)):
                    sent = 0
                    while sent < len(data):
                        fds = borrow_fds if sent == 0 else ()
                        try:
                            sent += socket.send_fds(self._socket, [data[sent:]], list(fds))
                        except BlockingIOError:
                            await self._writable()
            except TimeoutError as error:
                late = late_error(None, deadline, "the peer took nothing")
                self._end(late)
                raise late from error
            except OSError as error:
                self._end(error)
                raise

    async def wait(self, slot: Slot, deadline: float | None) -> Any:
        """The slot's result. Raises: what it failed with, DeadlineExceededError."""
        started = time.monotonic()
        try:
            async with asyncio.timeout_at(_loop_time(self._loop, deadline)):
                return await asyncio.shield(slot._future)
        except TimeoutError as error:
            if slot.done():
                return slot._future.result()
            raise late_error(started, deadline, "no answer came") from error

    def close(self) -> None:
        """End the channel. Idempotent."""
        self._end(None)

    async def _writable(self) -> None:
        changed: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._socket.fileno(), _finish, changed)
        try:
            await changed
        finally:
            if not self._ended:
                self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        if not data:
            self._end(None)
            return
        try:
            self._on_bytes(data)
        except Exception as error:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._on_end(error)


def late_error(started: float | None, deadline: float | None, what: str) -> DeadlineExceededError:
    """The error of a wait from ``started`` that passed ``deadline``."""
    now = time.monotonic()
    waited = now - started if started is not None else 0.0
    allowed = deadline - started if started is not None and deadline is not None else waited
    return DeadlineExceededError(
        f"{what} within {allowed:.3f} s", deadline_s=max(allowed, 0.0), waited_s=waited
    )


def _loop_time(loop: asyncio.AbstractEventLoop, deadline: float | None) -> float | None:
    return None if deadline is None else loop.time() + max(deadline - time.monotonic(), 0.0)
