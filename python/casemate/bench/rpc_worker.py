"""One client or server of ``casemate bench rpc`` in a process of its own: ``python -m casemate.bench.rpc_worker ROLE TARGET``.

Roles: ``sync`` and ``async``, our client by either face; ``serve``, our server, which answers each request with its own payload. TARGET
is a unix socket's path, or for the clients an agent's URL.

Clients answer each line ``run N SIZE WINDOW`` on standard input by one line: processor nanoseconds of this process, then N times
in nanoseconds, each a window's time by its size.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable

from casemate import _core
from casemate._compat import aio, blocking
from casemate.agent.transport import AGENT_PORT, HybridTransport, parse_url

SERVICE, METHOD = "casemate.Diagnostics", "Echo"
"""Service and method that the agent answers with the request's own payload."""

DIAL_S = 10.0

Run = Callable[[int, bytes, int], list[int]]


def connect(target: str) -> int:
    """A socket connected with the server, owned by the caller."""
    if "://" in target:
        transport = parse_url(target)
        if isinstance(transport, HybridTransport):
            return _core.connect_hybrid(str(transport.path), AGENT_PORT, timeout_s=DIAL_S)
        return _core.connect_vsock(transport.cid, AGENT_PORT, timeout_s=DIAL_S)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(target)
    return sock.detach()


def sync_client(target: str) -> Run:
    """The calling thread sends and reads."""
    connection = blocking.AgentConnection(connect(target))

    def window_of(payload: bytes, window: int) -> None:
        replies = [connection.submit_raw(SERVICE, METHOD, payload, None) for _ in range(window)]
        for reply in replies:
            _check(reply.result(), payload)

    def run(count: int, payload: bytes, window: int) -> list[int]:
        times = []
        for _ in range(count):
            started = time.perf_counter_ns()
            if window == 1:
                answer = connection.call_raw(SERVICE, METHOD, payload, None)
                times.append(time.perf_counter_ns() - started)
                _check(answer, payload)
            else:
                window_of(payload, window)
                times.append((time.perf_counter_ns() - started) // window)
        return times

    return run


def async_client(target: str) -> Run:
    """Calls awaited on an event loop."""
    loop = asyncio.new_event_loop()

    async def connected() -> aio.AgentConnection:
        return aio.AgentConnection(connect(target))

    connection = loop.run_until_complete(connected())

    async def window_of(payload: bytes, window: int) -> None:
        replies = [connection.submit_raw(SERVICE, METHOD, payload, None) for _ in range(window)]
        for reply in replies:
            _check(await reply.result(), payload)

    async def calls(count: int, payload: bytes, window: int) -> list[int]:
        times = []
        for _ in range(count):
            started = time.perf_counter_ns()
            if window == 1:
                answer = await connection.call_raw(SERVICE, METHOD, payload, None)
                times.append(time.perf_counter_ns() - started)
                _check(answer, payload)
            else:
                await window_of(payload, window)
                times.append((time.perf_counter_ns() - started) // window)
        return times

    return lambda count, payload, window: loop.run_until_complete(calls(count, payload, window))


def _check(answer: bytes, payload: bytes) -> None:
    if len(answer) != len(payload):
        raise SystemExit(f"{len(answer)} bytes came back of {len(payload)}")


def serve(path: str) -> None:
    """Serve each connection on a thread of its own until standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def accept() -> None:
        while True:
            accepted, _ = listener.accept()
            threading.Thread(target=_core.serve_echo, args=(accepted.detach(),), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


def main() -> None:
    """Serve, or answer the lines on standard input."""
    role, target = sys.argv[1:]
    if role == "serve":
        serve(target)
        return
    run = {"sync": sync_client, "async": async_client}[role](target)
    print("ready", flush=True)
    for line in sys.stdin:
        count, size, window = map(int, line.split()[1:])
        payload = bytes(size)
        before = time.process_time_ns()
        times = run(count, payload, window)
        print(time.process_time_ns() - before, *times, flush=True)


if __name__ == "__main__":
    main()
