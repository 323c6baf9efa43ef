"""A ttrpc server made by hand, byte by byte, so that it shares nothing with the client that it tests.

It knows four protobuf wire forms: a varint field, a length-delimited field, and their readings. A test scripts it: it reads
requests and answers when and how it likes.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

__all__ = ["Peer", "Request", "field", "number", "parse"]

REQUEST, RESPONSE = 1, 2


def varint(value: int) -> bytes:
    """A number in groups of seven bits, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(tag: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(tag << 3 | 2) + varint(len(data)) + data


def number(tag: int, value: int) -> bytes:
    """A varint field."""
    return varint(tag << 3) + varint(value)


def parse(message: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a message in which all are varints or length-delimited."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0

    def take_varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = take_varint()
        value = take_varint()
        if key & 7 == 2:
            fields.setdefault(key >> 3, []).append(message[position : position + value])
            position += value
        else:
            assert key & 7 == 0, f"wire type {key & 7}"
            fields.setdefault(key >> 3, []).append(value)
    return fields


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request as it stood on the wire."""

    stream: int
    flags: int
    service: str
    method: str
    payload: bytes
    timeout_ns: int


class Peer:
    """The server's end of a socket pair; ``client_fd()`` gives the other end away, once."""

    def __init__(self) -> None:
        self.socket, self._client = socket.socketpair()
        self.socket.settimeout(10)

    def client_fd(self) -> int:
        """The client's end, owned by the caller from here on."""
        return self._client.detach()

    def receive(self) -> Request:
        """The next request."""
        length, stream, kind, flags = struct.unpack(">IIBB", self._receive_exactly(10))
        assert kind == REQUEST
        fields = parse(self._receive_exactly(length))

        def last(tag: int, default: int | bytes) -> int | bytes:
            return fields.get(tag, [default])[-1]

        timeout_ns, payload = last(4, 0), last(3, b"")
        service, method = last(1, b""), last(2, b"")
        assert isinstance(service, bytes) and isinstance(method, bytes)
        assert isinstance(payload, bytes) and isinstance(timeout_ns, int)
        return Request(
            stream=stream,
            flags=flags,
            service=service.decode(),
            method=method.decode(),
            payload=payload,
            timeout_ns=timeout_ns,
        )

    def answer(self, stream: int, payload: bytes = b"") -> None:
        """Success with this message."""
        self.send_frame(stream, field(2, payload) if payload else b"")

    def refuse(self, stream: int, code: int, text: str) -> None:
        """An error status."""
        self.send_frame(stream, field(1, number(1, code) + field(2, text.encode())))

    def send_frame(
        self, stream: int, data: bytes, *, kind: int = RESPONSE, length: int | None = None
    ) -> None:
        """A frame, its length a lie when asked for."""
        head = struct.pack(">IIBB", len(data) if length is None else length, stream, kind, 0)
        self.socket.sendall(head + data)

    def close(self) -> None:
        """End the connection."""
        self.socket.close()
        self._client.close()

    def _receive_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError("the client closed the connection")
            data += piece
        return bytes(data)
