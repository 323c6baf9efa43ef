"""The agent's protocol as a server speaks it: ttrpc frames, and the few protobuf forms that its messages are made of."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["REQUEST", "RESPONSE", "Fields", "Frames", "Request", "answer", "data", "number", "refusal"]

REQUEST, RESPONSE = 1, 2
_HEAD = struct.Struct(">IIBB")
_MAX_FRAME_BYTES = 4 << 20


class Request(NamedTuple):
    """A request as it stood on the wire."""

    stream: int
    service: str
    method: str
    payload: bytes


class Fields:
    """The fields of a message in which all are numbers or have a length."""

    __slots__ = ("_values",)

    def __init__(self, message: bytes) -> None:
        self._values: dict[int, list[int | bytes]] = {}
        position = 0
        while position < len(message):
            key, position = _varint(message, position)
            value, position = _varint(message, position)
            tag, form = key >> 3, key & 7
            if form == 2:
                self._values.setdefault(tag, []).append(message[position : position + value])
                position += value
            elif form == 0:
                self._values.setdefault(tag, []).append(value)
            else:
                raise ValueError(f"field {tag} has the wire form {form}")

    def text(self, tag: int) -> str:
        """A string; empty when it is not there."""
        return self.bytes(tag).decode()

    def texts(self, tag: int) -> tuple[str, ...]:
        """A repeated string."""
        return tuple(one.decode() for one in self._values.get(tag, []) if isinstance(one, bytes))

    def bytes(self, tag: int) -> bytes:
        """Bytes or a message; empty when it is not there."""
        last = self._values.get(tag, [b""])[-1]
        return last if isinstance(last, bytes) else b""

    def messages(self, tag: int) -> tuple[Fields, ...]:
        """A repeated message."""
        return tuple(Fields(one) for one in self._values.get(tag, []) if not isinstance(one, int))

    def number(self, tag: int) -> int:
        """A number; 0 when it is not there."""
        last = self._values.get(tag, [0])[-1]
        return last if isinstance(last, int) else 0


class Frames:
    """Cuts what comes into requests."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, piece: bytes) -> Iterator[Request]:
        """Take what came and give the requests that are whole."""
        self._held += piece
        while len(self._held) >= _HEAD.size:
            length, stream, kind, _ = _HEAD.unpack_from(self._held)
            if length > _MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            if len(self._held) < _HEAD.size + length:
                return
            body = bytes(self._held[_HEAD.size : _HEAD.size + length])
            del self._held[: _HEAD.size + length]
            if kind == REQUEST:
                fields = Fields(body)
                yield Request(stream, fields.text(1), fields.text(2), fields.bytes(3))


def answer(stream: int, message: bytes) -> bytes:
    """The frame of a success."""
    return frame(stream, data(2, message))


def refusal(stream: int, code: int, text: str) -> bytes:
    """The frame of an error status."""
    return frame(stream, data(1, number(1, code) + data(2, text.encode())))


def frame(stream: int, body: bytes) -> bytes:
    """A response frame."""
    return _HEAD.pack(len(body), stream, RESPONSE, 0) + body


def data(tag: int, value: bytes) -> bytes:
    """A field with a length; absent when it is empty."""
    return _encode(tag << 3 | 2) + _encode(len(value)) + value if value else b""


def number(tag: int, value: int) -> bytes:
    """A number's field; absent when it is 0."""
    return _encode(tag << 3) + _encode(value) if value else b""


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
