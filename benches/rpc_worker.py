"""Our client in a process of its own, driven by ``rpc.py``: ``rpc_worker.py blocking|asyncio|handover PATH``.

``blocking`` and ``asyncio`` are the two ways in which casemate uses the native connection. ``handover`` is the design that it
does not use: a thread waits natively and hands each answer to the event loop.

Each line ``run N SIZE WINDOW`` on standard input is answered by one line: processor nanoseconds of this process, then N times in
nanoseconds, each a window's time by its size.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable

from casemate import _core

Run = Callable[[int, bytes, int], list[int]]


def connect(path: str) -> _core.Connection:
    """A native connection with the server."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return _core.Connection(sock.detach())


def blocking(path: str) -> Run:
    """The calling thread sends and reads."""
    connection = connect(path)

    def run(count: int, payload: bytes, window: int) -> list[int]:
        times = []
        if window == 1:
            for _ in range(count):
                started = time.perf_counter_ns()
                answer = connection.wait(connection.submit_raw("s", "m", payload))
                times.append(time.perf_counter_ns() - started)
                assert len(answer) == len(payload)
            return times
        for _ in range(count):
            started = time.perf_counter_ns()
            slots = [connection.submit_raw("s", "m", payload) for _ in range(window)]
            for slot in slots:
                assert len(connection.wait(slot)) == len(payload)
            times.append((time.perf_counter_ns() - started) // window)
        return times

    return run


class LoopClient:
    """The event loop's thread sends and, when the socket is readable, reads."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connection = connect(path)
        self._futures: dict[int, asyncio.Future[bytes]] = {}
        self._writing = False
        loop.add_reader(self._connection.fileno(), self._readable)

    def call(self, payload: bytes) -> asyncio.Future[bytes]:
        """One call."""
        slot = self._connection.submit_raw("s", "m", payload)
        future = self._futures[slot] = self._loop.create_future()
        if not self._writing and self._connection.wants_write:
            self._writing = True
            self._loop.add_writer(self._connection.fileno(), self._writable)
        return future

    def _readable(self) -> None:
        for slot, outcome in self._connection.on_readable():
            if isinstance(outcome, bytes):
                self._futures.pop(slot).set_result(outcome)
            else:
                self._futures.pop(slot).set_exception(outcome)

    def _writable(self) -> None:
        self._connection.on_writable()
        if not self._connection.wants_write:
            self._writing = False
            self._loop.remove_writer(self._connection.fileno())


class HandoverClient:
    """The event loop's thread sends, another thread waits and hands over."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connection = connect(path)
        self._open: queue.SimpleQueue[tuple[int, asyncio.Future[bytes]]] = queue.SimpleQueue()
        threading.Thread(target=self._wait, daemon=True).start()

    def call(self, payload: bytes) -> asyncio.Future[bytes]:
        """One call."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._open.put((self._connection.submit_raw("s", "m", payload), future))
        return future

    def _wait(self) -> None:
        while True:
            slot, future = self._open.get()
            self._loop.call_soon_threadsafe(future.set_result, self._connection.wait(slot))


def on_loop(path: str, make: Callable[[str, asyncio.AbstractEventLoop], LoopClient | HandoverClient]) -> Run:
    """Calls awaited on an event loop."""
    loop = asyncio.new_event_loop()
    client = make(path, loop)

    async def calls(count: int, payload: bytes, window: int) -> list[int]:
        times = []
        if window == 1:
            for _ in range(count):
                started = time.perf_counter_ns()
                answer = await client.call(payload)
                times.append(time.perf_counter_ns() - started)
                assert len(answer) == len(payload)
            return times
        for _ in range(count):
            started = time.perf_counter_ns()
            futures = [client.call(payload) for _ in range(window)]
            for future in futures:
                assert len(await future) == len(payload)
            times.append((time.perf_counter_ns() - started) // window)
        return times

    return lambda count, payload, window: loop.run_until_complete(calls(count, payload, window))


def main() -> None:
    """Answer the lines on standard input."""
    mode, path = sys.argv[1:]
    modes: dict[str, Callable[[], Run]] = {
        "blocking": lambda: blocking(path),
        "asyncio": lambda: on_loop(path, LoopClient),
        "handover": lambda: on_loop(path, HandoverClient),
    }
    run = modes[mode]()
    print("ready", flush=True)
    for line in sys.stdin:
        count, size, window = map(int, line.split()[1:])
        payload = bytes(size)
        before = time.process_time_ns()
        times = run(count, payload, window)
        print(time.process_time_ns() - before, *times, flush=True)


if __name__ == "__main__":
    main()
