"""An agent behind a hybrid vsock socket, scripted by a test: output and ends of containers, or whatever a hostile one sends."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tests.support.ttrpc_peer import Peer, Request, field, number, parse

__all__ = ["FakeAgent"]

Answer = Callable[[Peer, Request], None]


class FakeAgent:
    """Serves ``path`` until it is closed. Reads are answered with what the test has put out, waits when it says so.

    Attributes:
        connections: How many there were.
        misbehave: Called in place of an answer, when set.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections = 0
        self.misbehave: Answer | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._lock = threading.Lock()
        self._output: dict[str, deque[bytes]] = {"ReadStdout": deque(), "ReadStderr": deque()}
        self._status: int | None = None
        self._pending: list[Request] = []
        self._peer: Peer | None = None
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-agent")
        self._thread.start()

    def put(self, data: bytes, *, stream: str = "stdout") -> None:
        """Let a container's stream have ``data``; empty: its end."""
        with self._lock:
            self._output[f"Read{stream.capitalize()}"].append(data)
            self._serve()

    def exit(self, status: int) -> None:
        """Let the container end, its streams with it."""
        with self._lock:
            for pieces in self._output.values():
                pieces.append(b"")
            self._status = status
            self._serve()

    def wait_connected(self) -> None:
        """Wait until somebody has connected."""
        assert self._connected.wait(10)

    def break_connection(self) -> None:
        """Hang up on who is connected; the listener stays."""
        with self._lock:
            assert self._peer is not None
            self._connected.clear()
            self._peer.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it."""
        self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if self._peer is not None:
                self._peer.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self.path.unlink()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                greeting = b""
                while not greeting.endswith(b"\n"):
                    greeting += connection.recv(1)
                assert greeting == b"CONNECT 1024\n"
                connection.sendall(b"OK 1073741824\n")
                self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        peer = Peer()
        peer.close()
        peer.socket = connection
        with self._lock:
            self.connections += 1
            self._peer, self._pending = peer, []
            self._connected.set()
        while True:
            try:
                request = peer.receive()
                with self._lock:
                    if self.misbehave is not None:
                        self.misbehave(peer, request)
                        continue
                    self._pending.append(request)
                    self._serve()
            except (EOFError, OSError):
                break
        with self._lock:
            self._peer = None

    def _serve(self) -> None:
        """Answer what can be answered. Needs: the lock."""
        for request in list(self._pending):
            payload = self._payload(request)
            if payload is not None and self._peer is not None:
                self._pending.remove(request)
                self._peer.answer(request.stream, payload)

    def _payload(self, request: Request) -> bytes | None:
        if request.method == "WaitProcess":
            return None if self._status is None else number(1, self._status)
        pieces = self._output[request.method]
        if not pieces:
            return None
        (most,) = parse(request.payload)[3]
        assert isinstance(most, int)
        piece = pieces.popleft()
        if len(piece) > most:
            pieces.appendleft(piece[most:])
        return field(1, piece[:most]) if piece else b""
