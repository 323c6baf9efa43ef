"""How host and agent reach each other: one hybrid socket, or AF_VSOCK where the host's kernel has vhost-vsock.

Neither waits: sockets are made here, waiting is done by the faces.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Protocol

from casemate.errors import HostError

__all__ = ["AGENT_PORT", "HOST_PORT", "HybridTransport", "Transport", "VsockTransport"]

AGENT_PORT = 1024
"""The agent's RPC port (spec AP-001)."""

HOST_PORT = 10241
"""The port on which the host awaits the agent's call; next to that of the trace spans."""


class Transport(Protocol):
    """The two operations that the guest link needs."""

    @property
    def url(self) -> str:
        """The agent's address in the form that the reference system uses (spec SB-20)."""

    def listen(self, port: int) -> socket.socket:
        """A listening socket for calls of the guest to the host's ``port``."""


class HybridTransport:
    """A unix socket on which a VMM or a vsock backend serves ``CONNECT <port>``; calls of the guest come on ``<path>_<port>``."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def url(self) -> str:
        """``hvsock://<path>:<port>``."""
        return f"hvsock://{self.path}:{AGENT_PORT}"

    def listen(self, port: int) -> socket.socket:
        """Listen on ``<path>_<port>``. Raises: HostError. Does not block."""
        path = f"{self.path}_{port}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(4)
        except OSError as error:
            listener.close()
            raise HostError(
                f"no socket can be made at {path}: {error.strerror}",
                errno=error.errno or 0,
                target=path,
                op="transport.listen",
            ) from error
        return listener


class VsockTransport:
    """AF_VSOCK to a guest with a context id of its own (``/dev/vhost-vsock``)."""

    __slots__ = ("cid",)

    def __init__(self, cid: int) -> None:
        self.cid = cid

    @property
    def url(self) -> str:
        """``vsock://<cid>:<port>``."""
        return f"vsock://{self.cid}:{AGENT_PORT}"

    def listen(self, port: int) -> socket.socket:
        """Listen on the host's ``port`` for any guest. Raises: HostError. Does not block."""
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind((socket.VMADDR_CID_HOST, port))
            listener.listen(4)
        except OSError as error:
            listener.close()
            raise HostError(
                f"no vsock port {port} can be had on the host: {error.strerror}",
                errno=error.errno or 0,
                target=f"vsock:{port}",
                op="transport.listen",
            ) from error
        return listener
