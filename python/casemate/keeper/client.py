"""Asking a keeper: one line of JSON each way on its control socket, descriptors beside the line."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from casemate.errors import (
    DeadlineExceededError,
    HostError,
    InternalError,
    InvalidStateError,
    NotFoundError,
)

__all__ = ["CONTROL_SOCKET", "KeeperClient", "encode_bytes"]

CONTROL_SOCKET = "keeper.sock"
_MAX_LINE_BYTES = 1 << 20


def encode_bytes(value: str | bytes | os.PathLike[str]) -> str:
    """A byte string of the host as the control socket carries it: one character a byte."""
    return os.fsencode(value).decode("latin-1")


class KeeperClient:
    """One connection to a keeper. One request at a time.

    Args:
        take_socket: Connected; owned.
        sandbox_id: For the text of errors.
    """

    __slots__ = ("_held", "_sandbox_id", "_socket")

    def __init__(self, take_socket: socket.socket, sandbox_id: str) -> None:
        self._socket = take_socket
        self._sandbox_id = sandbox_id
        self._held = b""

    @classmethod
    def connect(cls, directory: Path, sandbox_id: str) -> KeeperClient:
        """Reach the keeper of the sandbox in ``directory``. Does not block.

        Raises:
            InvalidStateError: There is none: the sandbox is dead.
        """
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            control.connect(str(directory / CONTROL_SOCKET))
        except OSError as error:
            control.close()
            raise _dead(sandbox_id) from error
        return cls(control, sandbox_id)

    def fileno(self) -> int:
        """The socket, borrowed: readable when an answer has come."""
        return self._socket.fileno()

    def request(
        self, op: str, *, timeout_s: float, borrow_fds: Sequence[int] = (), **fields: Any
    ) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            InvalidStateError: The keeper refuses in this state, or has ended.
            NotFoundError: What was named is not kept.
            HostError: The host refused it, with ``errno``.
            DeadlineExceededError: No answer in ``timeout_s``.
        Blocks: for the answer.
        """
        self.send(op, borrow_fds=borrow_fds, **fields)
        return self.receive(timeout_s=timeout_s)

    def send(self, op: str, *, borrow_fds: Sequence[int] = (), **fields: Any) -> None:
        """Ask only. Blocks: while the keeper does not read, at most 10 s."""
        line = msgspec.json.encode({"op": op, **fields}) + b"\n"
        self._socket.settimeout(10.0)
        try:
            sent = socket.send_fds(self._socket, [line], list(borrow_fds)) if borrow_fds else 0
            self._socket.sendall(line[sent:])
        except TimeoutError as error:
            raise self._late(10.0, 10.0) from error
        except OSError as error:
            raise _dead(self._sandbox_id) from error

    def receive(self, *, timeout_s: float) -> dict[str, Any]:
        """The next answer. Raises and blocks as :meth:`request`."""
        started = time.monotonic()
        deadline = started + timeout_s
        while b"\n" not in self._held:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or len(self._held) > _MAX_LINE_BYTES:
                raise self._late(timeout_s, time.monotonic() - started)
            self._socket.settimeout(left_s)
            # An end of the time shows at the next turn.
            with contextlib.suppress(TimeoutError):
                self._take()
        line, _, self._held = self._held.partition(b"\n")
        answer = msgspec.json.decode(line)
        if "ok" in answer:
            return dict(answer["ok"])
        raise self._refused(answer["error"])

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._socket.close()

    def __enter__(self) -> KeeperClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        try:
            piece = self._socket.recv(65536)
        except ConnectionError as error:
            raise _dead(self._sandbox_id) from error
        if not piece:
            raise _dead(self._sandbox_id)
        self._held += piece

    def _late(self, timeout_s: float, waited_s: float) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the keeper of sandbox {self._sandbox_id!r} did not answer within {timeout_s:g} s",
            deadline_s=timeout_s,
            waited_s=waited_s,
            op="keeper.request",
            sandbox_id=self._sandbox_id,
        )

    def _refused(self, error: dict[str, Any]) -> Exception:
        text, kind = error["text"], error["kind"]
        context = {"op": "keeper.request", "sandbox_id": self._sandbox_id}
        if kind == "not_found":
            return NotFoundError(text, **context)
        if kind == "state":
            return InvalidStateError(text, state="kept", wanted="", **context)
        if kind in ("host", "spawn"):
            return HostError(text, errno=error["errno"] or 0, target=self._sandbox_id, **context)
        return InternalError(text, **context)


def _dead(sandbox_id: str) -> InvalidStateError:
    return InvalidStateError(
        f"sandbox {sandbox_id!r} is dead: its keeper has ended; `casemate cleanup {sandbox_id}` removes what is left",
        state="dead",
        wanted="running",
        op="keeper.request",
        sandbox_id=sandbox_id,
    )
