"""A socket that many threads wait on at once: one of those that wait reads for all."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from casemate.errors import DeadlineExceededError

__all__ = ["Channel", "Slot"]

_RECEIVE_BYTES = 65536


class Slot:
    """A place for one result."""

    __slots__ = ("_done", "_error", "_value")

    def __init__(self) -> None:
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None

    def resolve(self, value: Any) -> None:
        """Give the result; a second one is dropped."""
        if not self._done:
            self._value = value
            self._done = True

    def fail(self, error: BaseException) -> None:
        """End with ``error``; dropped when there is a result."""
        if not self._done:
            self._error = error
            self._done = True

    def done(self) -> bool:
        """Whether :meth:`Channel.wait` would not wait."""
        return self._done

    def result(self) -> Any:
        """The result of a slot that is done."""
        if self._error is not None:
            raise self._error
        return self._value


class Channel:
    """A connected stream socket whose bytes go to ``on_bytes``, and its end, once, to ``on_end``.

    Both are called with nothing else of the channel's owner running. ``on_end`` gets what ``on_bytes`` raised, the system's
    error, or None at the end of the stream or after :meth:`close`. Owns the socket.
    """

    __slots__ = ("_changed", "_ended", "_leading", "_on_bytes", "_on_end", "_send_lock", "_socket", "_users")

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
        self._changed = threading.Condition(threading.RLock())
        self._send_lock = threading.Lock()
        self._ended = False
        self._leading = False
        self._users = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more is sent or read."""
        return self._ended

    def send(self, make: Callable[[], bytes], deadline: float | None, borrow_fds: Sequence[int] = ()) -> None:
        """Send what ``make`` gives, with descriptors beside its first byte. A send that fails ends the channel.

        Raises:
            DeadlineExceededError: The peer takes nothing; OSError.
        """
        with self._send_lock:
            with self._changed:
                data = make()
                if not self._enter():
                    raise BrokenPipeError("the channel has ended")
            try:
                self._send(data, deadline, list(borrow_fds))
            except (OSError, DeadlineExceededError) as error:
                self._end(error)
                raise
            finally:
                self._leave()

    def wait(self, slot: Slot, deadline: float | None) -> Any:
        """The slot's result. Raises: what it failed with, DeadlineExceededError."""
        started = time.monotonic()
        while True:
            with self._changed:
                while self._leading and not slot.done():
                    left_s = None if deadline is None else deadline - time.monotonic()
                    if left_s is not None and left_s <= 0:
                        raise late_error(started, deadline, "no answer came")
                    self._changed.wait(left_s)
                if slot.done():
                    return slot.result()
                if not self._enter():
                    raise BrokenPipeError("the channel has ended")
                self._leading = True
            try:
                came = self._lead(deadline)
            finally:
                with self._changed:
                    self._leading = False
                    self._changed.notify_all()
                self._leave()
            if not came and not slot.done():
                raise late_error(started, deadline, "no answer came")

    def close(self) -> None:
        """End the channel. Idempotent."""
        self._end(None)

    def _lead(self, deadline: float | None) -> bool:
        if not self._poll(select.POLLIN, deadline):
            return False
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError as error:
            self._end(error)
            return True
        if not data:
            self._end(None)
            return True
        with self._changed:
            if self._ended:
                return True
            try:
                self._on_bytes(data)
            except Exception as error:
                self._end(error)
        return True

    def _send(self, data: bytes, deadline: float | None, fds: list[int]) -> None:
        started = time.monotonic()
        sent = 0
        while sent < len(data):
            try:
                sent += socket.send_fds(self._socket, [data[sent:]], fds)
                fds = []
            except BlockingIOError:
                if not self._poll(select.POLLOUT, deadline):
                    raise late_error(started, deadline, "the peer took nothing") from None

    def _poll(self, events: int, deadline: float | None) -> bool:
        poll = select.poll()
        poll.register(self._socket, events)
        left_ms = None if deadline is None else max((deadline - time.monotonic()) * 1000, 0.0)
        return bool(poll.poll(left_ms))

    def _enter(self) -> bool:
        if self._ended:
            return False
        self._users += 1
        return True

    def _leave(self) -> None:
        with self._changed:
            self._users -= 1
            if self._ended and self._users == 0:
                self._socket.close()

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            if self._ended:
                return
            self._ended = True
            if self._users == 0:
                self._socket.close()
            else:
                # Whoever polls it now wakes; the last one closes it, so that its number is not given away under them.
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the peer is gone already, which wakes them too
            self._on_end(error)
            self._changed.notify_all()


def late_error(started: float | None, deadline: float | None, what: str) -> DeadlineExceededError:
    """The error of a wait from ``started`` that passed ``deadline``."""
    now = time.monotonic()
    waited = now - started if started is not None else 0.0
    allowed = deadline - started if started is not None and deadline is not None else waited
    return DeadlineExceededError(
        f"{what} within {allowed:.3f} s", deadline_s=max(allowed, 0.0), waited_s=waited
    )
