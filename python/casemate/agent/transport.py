"""How host and agent reach each other: one hybrid socket, or AF_VSOCK where the host's kernel has vhost-vsock.

Neither waits: sockets are made here, waiting is done by the faces.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Protocol

from casemate.errors import HostError, InvalidConfigError, UnsupportedError

__all__ = ["AGENT_PORT", "HybridTransport", "Transport", "VsockTransport", "choose_host_port", "parse_url"]

AGENT_PORT = 1024
"""The agent's RPC port (spec AP-001)."""

_FIRST_HOST_PORT = 1 << 16
_HOST_PORTS = 1 << 24


def choose_host_port() -> int:
    """A port on which a host awaits its agent's call. With AF_VSOCK all sandboxes of a host share the ports: so it is drawn at random."""
    return _FIRST_HOST_PORT + int.from_bytes(os.urandom(8), "little") % _HOST_PORTS


class Transport(Protocol):
    """The two operations that the guest link needs."""

    @property
    def url(self) -> str:
        """The agent's address in the form that the reference system uses (spec SB-20)."""

    def listen(self, port: int) -> socket.socket:
        """A listening socket for calls of the guest to the host's ``port``."""

    def is_guest(self, address: object) -> bool:
        """Whether a caller with this socket address is the guest, and not another one of the host."""


def parse_url(url: str) -> HybridTransport | VsockTransport:
    """The transport that a URL names; the inverse of its ``url``. Does not block.

    Raises:
        UnsupportedError: The scheme is of another kind of sandbox.
        InvalidConfigError: It is no such URL.
    """
    scheme, separator, rest = url.partition("://")
    head, colon, port = rest.rpartition(":")
    if not separator or not colon or port != str(AGENT_PORT):
        raise InvalidConfigError(
            f"the agent's address is {url!r}, 'hvsock://PATH:{AGENT_PORT}' or 'vsock://CID:{AGENT_PORT}' is expected",
            path="agent_url",
        )
    if scheme == "hvsock" and head.startswith("/") and ":" not in head:
        return HybridTransport(Path(head))
    if scheme == "vsock" and head.isascii() and head.isdigit() and 3 <= int(head) < 2**32 - 1:
        return VsockTransport(int(head))
    if scheme in ("remote", "mock"):
        raise UnsupportedError(
            f"the agent's address {url!r} is of a kind that is not served", capability=scheme
        )
    raise InvalidConfigError(
        f"the agent's address {url!r} has no usable path or context id", path="agent_url"
    )


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

    def is_guest(self, address: object) -> bool:
        """Always: the socket lies in the sandbox's own directory."""
        return True


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

    def is_guest(self, address: object) -> bool:
        """Whether the caller has the guest's context id."""
        return isinstance(address, tuple) and address[:1] == (self.cid,)
