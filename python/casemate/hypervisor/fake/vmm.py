"""The fake VMM's process: one loop over its QMP connection, the guest's connections and its timers.

Started as QEMU is, or with ``-hybrid PATH`` alone: then it serves the guest's vsock on that socket itself and has no QMP. The
guest calls the host as soon as it has booted, on the port that its kernel parameters name. ``-fake JSON`` scripts it:

``log``
    A file that gets a line of JSON for the start, each QMP command and each request to the agent.
``boot``
    ``silent``: the agent never calls; ``panic``: the kernel panics.
``faults``
    By method of the agent or QMP command: ``refuse``, ``silence``, ``garbage``, ``length``, ``stream``, ``trickle`` or ``die``.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from . import wire
from .agent import Agent, Refusal
from .machine import Machine, QmpRefusal, options

__all__ = ["main"]

_FLAGS = ("-S", "-no-user-config", "-nodefaults", "-no-reboot")
_OPTIONS = (
    *(
        "-name",
        "-uuid",
        "-machine",
        "-accel",
        "-cpu",
        "-chardev",
        "-mon",
        "-serial",
        "-m",
        "-object",
        "-blockdev",
    ),
    *(
        "-netdev",
        "-device",
        "-rtc",
        "-global",
        "-vga",
        "-display",
        "-kernel",
        "-initrd",
        "-append",
        "-sandbox",
    ),
    *("-smp", "-fake", "-hybrid"),
)
_PANIC = b"[    1.0] Kernel panic - not syncing: sysrq triggered crash\r\n"


def main(arguments: list[str]) -> None:
    """Run until the VM ends."""
    if arguments == ["--version"]:
        print("QEMU emulator version 7.2.0 (fake)")
        return
    _check(arguments)
    try:
        vmm = Vmm(arguments)
    except QmpRefusal as refusal:
        sys.exit(f"qemu: -device: {refusal}")
    vmm.run()


def _check(arguments: list[str]) -> None:
    words = iter(arguments)
    for word in words:
        if word in _OPTIONS:
            next(words, None)
        elif word not in _FLAGS:
            sys.exit(f"qemu: {word}: invalid option")


def _values(arguments: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(arguments) if word == option]


class Vmm:
    """The process."""

    def __init__(self, arguments: list[str]) -> None:
        self._script: dict[str, Any] = {}
        for text in _values(arguments, "-fake"):
            self._script.update(json.loads(text))
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._qmp: socket.socket | None = None
        self._qmp_text = ""
        self._frames: dict[socket.socket, wire.Frames] = {}
        # What comes and goes while the vCPUs stand.
        self._held: list[tuple[socket.socket, wire.Request]] = []
        self._unsent: list[tuple[socket.socket, bytes]] = []
        self._machine = Machine(arguments, tell=self._tell, quit=self._end)
        self._agent = Agent(
            has_disk=self._machine.has_disk if "-hybrid" not in arguments else lambda _: True,
            name_of=self._machine.name_of,
            after=self._after,
            panic=self._panic,
            power_off=lambda: self._after(0.01, self._end),
        )
        chardevs = {one["id"]: int(one["fd"]) for one in map(options, _values(arguments, "-chardev"))}
        self._console = chardevs.get("console", -1)
        for hybrid in _values(arguments, "-hybrid"):
            self._uds = hybrid
            self._listen(self._bound(hybrid), self._accept_host)
        if "qmp" in chardevs:
            listener = socket.socket(fileno=chardevs["qmp"])
            self._uds = listener.getsockname().rpartition("/")[0] + "/vsock.sock"
            self._listen(listener, self._accept_qmp)
        self._record({"start": arguments})
        self._boot(" ".join(_values(arguments, "-append")).split())

    def run(self) -> None:
        """Serve for ever; the end comes by :meth:`_end`."""
        while True:
            wait_s = max(self._timers[0][0] - time.monotonic(), 0) if self._timers else None
            for key, _ in self._selector.select(wait_s):
                key.data(key.fileobj)
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()

    def _boot(self, parameters: list[str]) -> None:
        self._say(b"[    0.0] fake guest\r\n")
        boot = self._script.get("boot", "")
        if boot == "panic":
            self._after(0.0, self._panic)
        elif not boot:
            for word in parameters:
                name, _, port = word.partition("=")
                if name == "casemate.host_port":
                    self._after(0.0, functools.partial(self._call_host, port))

    def _call_host(self, port: str) -> None:
        if self._machine.paused:
            self._after(0.01, functools.partial(self._call_host, port))
            return
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"{self._uds}_{port}")
        except OSError as error:
            self._say(f"[    0.1] no host: {error}\r\n".encode())
            connection.close()
            return
        self._serve_guest(connection)

    def _bound(self, path: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(8)
        return listener

    def _listen(self, listener: socket.socket, accept: Callable[[socket.socket], None]) -> None:
        self._selector.register(listener, selectors.EVENT_READ, lambda _: accept(listener.accept()[0]))

    def _accept_host(self, connection: socket.socket) -> None:
        # CONNECT <port>, as short as it is comes in one piece.
        words = connection.recv(64).decode().split()
        if words != ["CONNECT", "1024"]:
            connection.close()
            return
        connection.sendall(b"OK 1073741824\n")
        self._serve_guest(connection)

    def _serve_guest(self, connection: socket.socket) -> None:
        self._frames[connection] = wire.Frames()
        self._selector.register(connection, selectors.EVENT_READ, self._read_guest)

    def _read_guest(self, connection: socket.socket) -> None:
        try:
            piece = connection.recv(1 << 18)
        except ConnectionError:
            piece = b""
        if not piece:
            self._selector.unregister(connection)
            del self._frames[connection]
            connection.close()
            return
        for request in self._frames[connection].feed(piece):
            self._record({"rpc": request.method, **_names(request)})
            if self._machine.paused:
                self._held.append((connection, request))
            else:
                self._serve_request(connection, request)

    def _serve_request(self, connection: socket.socket, request: wire.Request) -> None:
        fault = self._script.get("faults", {}).get(request.method, "")
        stream = request.stream
        if fault == "die":
            os._exit(1)
        elif fault == "garbage":
            self._send(connection, b"\xff" * 64)
        elif fault == "length":
            self._send(connection, b"\xff\xff\xff\xff" + wire.answer(stream, b"")[4:])
        elif fault == "stream":
            self._send(connection, wire.answer(stream + 1000, b""))
        elif fault == "trickle":
            self._trickle(connection, wire.answer(stream, b""))
        elif fault == "refuse":
            self._send(connection, wire.refusal(stream, 13, f"{request.method} was made to fail"))
        elif not fault:
            try:
                self._agent.handle(
                    request, lambda message: self._send(connection, wire.answer(stream, message))
                )
            except Refusal as refusal:
                self._send(connection, wire.refusal(stream, refusal.code, str(refusal)))

    def _trickle(self, connection: socket.socket, data: bytes) -> None:
        self._send(connection, data[:1])
        if data[1:]:
            self._after(1.0, lambda: self._trickle(connection, data[1:]))

    def _send(self, connection: socket.socket, data: bytes) -> None:
        if connection not in self._frames:
            return  # hung up meanwhile
        if self._machine.paused:
            self._unsent.append((connection, data))
            return
        try:
            connection.sendall(data)
        except ConnectionError:
            pass  # reading tells of it

    def _accept_qmp(self, connection: socket.socket) -> None:
        self._qmp = connection
        version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "fake"}
        self._write_qmp({"QMP": {"version": version, "capabilities": ["oob"]}})
        self._selector.register(connection, selectors.EVENT_READ, self._read_qmp)

    def _read_qmp(self, connection: socket.socket) -> None:
        piece, fds, _, _ = socket.recv_fds(connection, 1 << 16, 16)
        for fd in fds:
            os.close(fd)
        if not piece:
            self._selector.unregister(connection)
            return
        # QEMU reads documents, not lines: a client need not end them.
        text = self._qmp_text + piece.decode()
        decoder = json.JSONDecoder()
        while text := text.lstrip():
            try:
                command, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break
            text = text[end:]
            self._answer_qmp(command)
        self._qmp_text = text

    def _answer_qmp(self, command: dict[str, Any]) -> None:
        name = command.get("execute") or command.get("exec-oob") or ""
        self._record({"qmp": name, "arguments": command.get("arguments", {})})
        identity = {"id": command["id"]} if "id" in command else {}
        fault = self._script.get("faults", {}).get(name, "")
        if fault == "die":
            os._exit(1)
        if fault == "silence":
            return
        try:
            if fault:
                raise QmpRefusal(f"{name} was made to fail")
            value = (
                {}
                if name == "qmp_capabilities"
                else self._machine.execute(name, command.get("arguments", {}))
            )
        except QmpRefusal as refusal:
            self._write_qmp({"error": {"class": refusal.error_class, "desc": str(refusal)}, **identity})
            return
        self._write_qmp({"return": value, **identity})
        if not self._machine.paused:
            held, self._held, unsent, self._unsent = self._held, [], self._unsent, []
            for connection, data in unsent:
                self._send(connection, data)
            for connection, request in held:
                self._serve_request(connection, request)

    def _write_qmp(self, document: dict[str, Any]) -> None:
        assert self._qmp is not None
        self._qmp.sendall(json.dumps(document).encode() + b"\r\n")

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        if self._qmp is not None:
            stamp = {"seconds": int(time.time()), "microseconds": 0}
            self._write_qmp({"event": event, "data": data, "timestamp": stamp})

    def _after(self, delay_s: float, run: Callable[[], None]) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timer_count, run))

    def _panic(self) -> None:
        self._say(_PANIC)
        self._end()

    def _say(self, text: bytes) -> None:
        if self._console >= 0:
            os.write(self._console, text)

    def _record(self, entry: dict[str, Any]) -> None:
        if "log" in self._script:
            with open(self._script["log"], "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(json.dumps(entry) + "\n")

    def _end(self) -> None:
        self._after(0.0, lambda: os._exit(0))


def _names(request: wire.Request) -> dict[str, str]:
    if request.service != "grpc.AgentService" or request.method in ("CreateSandbox", "GetGuestDetails"):
        return {}
    fields = wire.Fields(request.payload)
    names = {"container": fields.text(1)}
    if request.method not in ("StartContainer", "RemoveContainer", "StatsContainer", "PauseContainer"):
        names["process"] = fields.text(2) if request.method != "ResumeContainer" else ""
    return {name: text for name, text in names.items() if text}
