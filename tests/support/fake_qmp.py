"""QEMU's side of a QMP connection, served by a thread: answers from a table, events and silence on demand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

__all__ = ["SILENCE", "FakeQmp", "Refusal"]

SILENCE = object()
"""As an answer: none is given."""


class Refusal(Exception):
    """As an answer: an error of that class and text."""

    def __init__(self, error_class: str, text: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class FakeQmp:
    """Greets, negotiates, answers each command from ``answers`` (default ``{}``), records them in ``commands``."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        version: tuple[int, int, int] = (7, 2, 0),
        capabilities: tuple[str, ...] = ("oob",),
    ) -> None:
        self.answers: dict[str, object] = {}
        self.commands: list[dict[str, Any]] = []
        self.unanswered: list[Any] = []
        self.closed = False
        self._socket = sock
        self._version = version
        self._capabilities = capabilities
        self._negotiated = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="fake-qmp")

    def __enter__(self) -> FakeQmp:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, as when QEMU dies."""
        self.closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was faster
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def send(self, document: dict[str, Any]) -> None:
        """Send one message."""
        self.send_bytes(json.dumps(document).encode() + b"\r\n")

    def send_bytes(self, data: bytes) -> None:
        """Send what may be no message."""
        self._socket.sendall(data)

    def event(self, name: str, **data: Any) -> None:
        """Tell of an event."""
        self.send({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})

    def await_command(self, name: str, timeout_s: float = 5.0) -> dict[str, Any]:
        """The first command of that name, when it has come."""

        def came() -> bool:
            return any(name in command.values() for command in self.commands)

        with self._changed:
            assert self._changed.wait_for(came, timeout_s), f"{name} did not come: {self.commands}"
            return next(command for command in self.commands if name in command.values())

    def _serve(self) -> None:
        major, minor, micro = self._version
        version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "fake"}
        self.send({"QMP": {"version": version, "capabilities": list(self._capabilities)}})
        try:
            for command in self._documents():
                self._handle(command)
        except OSError:
            pass  # the client has gone

    def _documents(self) -> Iterator[dict[str, Any]]:
        # QEMU reads documents, not lines: a client need not end them.
        decoder = json.JSONDecoder()
        text = ""
        while data := self._socket.recv(65536):
            text += data.decode()
            while text := text.lstrip():
                try:
                    document, end = decoder.raw_decode(text)
                except json.JSONDecodeError:
                    break
                text = text[end:]
                yield document

    def _handle(self, command: dict[str, Any]) -> None:
        name = command.get("execute") or command.get("exec-oob") or ""
        with self._changed:
            self.commands.append(command)
            self._changed.notify_all()
        answer = self.answers.get(name, {})
        if callable(answer):
            make: Callable[[dict[str, Any]], object] = answer
            answer = make(command)
        if not self._negotiated and name != "qmp_capabilities":
            answer = Refusal("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        elif name == "qmp_capabilities":
            self._negotiated = True
        if answer is SILENCE:
            self.unanswered.append(command.get("id"))
        elif isinstance(answer, Refusal):
            error = {"class": answer.error_class, "desc": str(answer)}
            self.send({"error": error, **_id(command)})
        else:
            self.send({"return": answer, **_id(command)})


def _id(command: dict[str, Any]) -> dict[str, Any]:
    return {"id": command["id"]} if "id" in command else {}
