"""Waiting in the calling thread. Never imports asyncio."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar

from casemate import _core
from casemate._compat._blocking_channel import Channel, Slot
from casemate.errors import DeadlineExceededError

__all__ = [
    "AgentConnection",
    "Channel",
    "Later",
    "Lock",
    "Reply",
    "Slot",
    "Stream",
    "gather",
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


def gather(*steps: Callable[[], Any]) -> list[Any]:
    """Run steps side by side in threads (the first one in this thread); the first failure is raised when all ended."""
    results: list[Any] = [None] * len(steps)
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = steps[index]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(1, len(steps))]
    for thread in threads:
        thread.start()
    if steps:
        run(0)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


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


class Stream:
    """A connected stream socket with deadlines. Owns the socket."""

    __slots__ = ("_socket",)

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send_all(self, data: bytes, deadline: float | None) -> None:
        """Send everything. Raises: DeadlineExceededError, OSError."""
        started = self._arm(deadline)
        try:
            self._socket.sendall(data)
        except TimeoutError as error:
            raise _late(started, deadline) from error

    def receive(self, max_bytes: int, deadline: float | None) -> bytes:
        """What has come, at most ``max_bytes``; empty at the end. Raises: DeadlineExceededError, OSError."""
        started = self._arm(deadline)
        try:
            return self._socket.recv(max_bytes)
        except TimeoutError as error:
            raise _late(started, deadline) from error

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _arm(self, deadline: float | None) -> float:
        now = time.monotonic()
        if deadline is not None and deadline <= now:
            raise _late(now, deadline)
        self._socket.settimeout(None if deadline is None else deadline - now)
        return now


class Reply:
    """The answer of one request that is under way."""

    __slots__ = ("_connection", "_native", "slot")

    def __init__(self, connection: AgentConnection, native: _core.Connection, slot: int) -> None:
        self._connection = connection
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

    def __init__(self, take_fd: int, watch: _core.ChildProcess | None = None) -> None:
        self._native = _core.Connection(take_fd, watch=watch)

    def submit(self, service: str, method: str, request: bytes, timeout_s: float | None) -> Reply:
        """Send a JSON request. Does not wait."""
        return Reply(self, self._native, self._native.submit(service, method, request, timeout_s=timeout_s))

    def submit_write_stdin(
        self, container_id: str, exec_id: str, data: bytes, timeout_s: float | None
    ) -> Reply:
        """Send WriteStdin. Does not wait."""
        slot = self._native.submit_write_stdin(container_id, exec_id, data, timeout_s=timeout_s)
        return Reply(self, self._native, slot)

    def submit_read(self, container_id: str, exec_id: str, length: int, stderr: bool) -> Reply:
        """Send ReadStdout or ReadStderr. Does not wait."""
        slot = self._native.submit_read(container_id, exec_id, length, stderr=stderr)
        return Reply(self, self._native, slot)

    def wait_any(self, replies: Sequence[Reply], timeout_s: float | None = None) -> list[Reply]:
        """Those that are done, at least one; empty at ``timeout_s``."""
        done = set(self._native.wait_any([reply.slot for reply in replies], timeout_s))
        return [reply for reply in replies if reply.slot in done]

    def forget(self, slot: int) -> None:
        """Forget a request."""
        self._native.cancel(slot)

    @property
    def closed(self) -> bool:
        """Whether the connection is closed or broken."""
        return self._native.closed

    def close(self) -> None:
        """Close; open requests end with AgentConnectionError. Idempotent."""
        self._native.close()


def _late(started: float, deadline: float | None) -> DeadlineExceededError:
    waited = time.monotonic() - started
    return DeadlineExceededError(
        f"the socket was not ready within {waited:.3f} s",
        deadline_s=0.0 if deadline is None else max(deadline - started, 0.0),
        waited_s=waited,
    )
