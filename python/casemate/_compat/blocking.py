"""Waiting in the calling thread. Never imports asyncio."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

from casemate import _core
from casemate._compat._blocking_background import Background, Mailbox
from casemate._compat._blocking_channel import Channel, Slot

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

Later = Annotated[T, "at once"]

Lock = threading.Lock


def to_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the function: the calling thread may block."""
    return function(*args, **kwargs)


def shielded(work: T) -> T:
    """Nothing cancels a blocking call: the work is done already."""
    return work


def wait_readable(fds: Sequence[int], deadline: float | None) -> list[int]:
    """Those of ``fds`` that can be read, at least one; empty at the deadline."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    timeout_ms = None if deadline is None else max((deadline - time.monotonic()) * 1000, 0.0)
    return [fd for fd, _ in poll.poll(timeout_ms)]


class Reply:
    """The answer of one request that is under way."""

    __slots__ = ("_native", "slot")

    def __init__(self, native: _core.Connection, slot: int) -> None:
        self._native = native
        self.slot = slot

    def result(self) -> bytes:
        """The answer. An interrupted wait forgets the request. Raises: what the answer carries."""
        try:
            return self._native.wait(self.slot)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return bool(self._native.wait_any([self.slot], 0.0))

    def cancel(self) -> None:
        """Forget the request; a late answer is dropped."""
        self._native.cancel(self.slot)


class AgentConnection:
    """An agent connection served by the threads that wait on it."""

    def __init__(self, take_fd: int, watch: HasFileno | None = None) -> None:
        self._native = _core.Connection(take_fd, watch=watch)

    def submit(self, service: str, method: str, request: bytes, timeout_s: float | None) -> Reply:
        """Send a JSON request. Does not wait."""
        return Reply(self._native, self._native.submit(service, method, request, timeout_s=timeout_s))

    def call(self, service: str, method: str, request: bytes, timeout_s: float | None) -> bytes:
        """Send a JSON request and wait for its answer. Raises: what the answer carries."""
        return self._native.call(service, method, request, timeout_s)

    def call_raw(self, service: str, method: str, request: bytes, timeout_s: float | None) -> bytes:
        """As :meth:`call` for a protobuf message, as its answer is one."""
        return self._native.call_raw(service, method, request, timeout_s)

    def submit_raw(self, service: str, method: str, request: bytes, timeout_s: float | None) -> Reply:
        """Send a request that is a protobuf message already, as its answer will be. Does not wait."""
        return Reply(self._native, self._native.submit_raw(service, method, request, timeout_s=timeout_s))

    def submit_write_stdin(
        self, container_id: str, exec_id: str, data: bytes, timeout_s: float | None
    ) -> Reply:
        """Send WriteStdin. Does not wait."""
        slot = self._native.submit_write_stdin(container_id, exec_id, data, timeout_s=timeout_s)
        return Reply(self._native, slot)

    def submit_read(self, container_id: str, exec_id: str, length: int, stderr: bool) -> Reply:
        """Send ReadStdout or ReadStderr. Does not wait."""
        slot = self._native.submit_read(container_id, exec_id, length, stderr=stderr)
        return Reply(self._native, slot)

    def wait_any(self, replies: Sequence[Reply], timeout_s: float | None = None) -> list[Reply]:
        """Those that are done, at least one; empty at ``timeout_s``."""
        done = set(self._native.wait_any([reply.slot for reply in replies], timeout_s))
        return [reply for reply in replies if reply.slot in done]

    @property
    def closed(self) -> bool:
        """Whether the connection is closed or broken."""
        return self._native.closed

    def fail(self, text: str) -> None:
        """Break it: open requests end with AgentConnectionError, later ones are refused. Idempotent."""
        self._native.fail(text)

    def close(self) -> None:
        """Close; open requests end with AgentConnectionError. Idempotent."""
        self._native.close()
