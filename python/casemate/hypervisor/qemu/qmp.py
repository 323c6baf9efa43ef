"""The QEMU Machine Protocol without I/O: bytes in, messages out; commands to bytes.

QEMU is trusted less than ourselves, since a guest may have broken into it: a line has a longest length, and what is no
QMP ends the conversation for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from casemate.errors import HypervisorError, InvalidStateError, QmpError
from casemate.hypervisor.qemu.probe import check_version

__all__ = ["MAX_LINE_BYTES", "Event", "Greeting", "Message", "QmpProtocol", "Reply", "matches"]

MAX_LINE_BYTES = 16 * 1024 * 1024
"""The largest answer, ``query-qmp-schema``, has some 200 KiB."""
_QUOTED = 200
_OOB_COMMANDS = frozenset({"migrate-pause", "migrate-recover", "yank"})
"""Commands that QEMU runs beside its main loop."""


class Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """The first message: QEMU's version and what it can do (``oob``)."""

    version: tuple[int, int, int]
    package: str
    capabilities: frozenset[str]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the command ``id``: ``value``, or ``error`` when QEMU refused it."""

    id: int
    value: Any = None
    error: QmpError | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. ``time_us`` is QEMU's clock in microseconds since 1970, None when it does not know."""

    name: str
    data: dict[str, Any]
    time_us: int | None = None


Message = Greeting | Reply | Event


class _Version(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _VersionInfo(msgspec.Struct):
    qemu: _Version
    package: str = ""


class _Hello(msgspec.Struct):
    version: _VersionInfo
    capabilities: list[Any] = []


class _Fault(msgspec.Struct):
    class_: str = msgspec.field(name="class", default="GenericError")
    desc: str = ""


class _Time(msgspec.Struct):
    seconds: int
    microseconds: int


class _Line(msgspec.Struct):
    hello: _Hello | None = msgspec.field(name="QMP", default=None)
    value: Any = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Fault | None = None
    event: str | None = None
    data: dict[str, Any] = {}
    timestamp: _Time | None = None
    id: Any = None


class QmpProtocol:
    """One conversation with one QEMU.

    Feed it what arrives; send what :meth:`encode` gives. The greeting must have come before a command is encoded.
    """

    __slots__ = (
        "_buffer",
        "_decoder",
        "_encoder",
        "_fault",
        "_max_line_bytes",
        "_next_id",
        "_open",
        "_scanned",
        "greeting",
        "oob",
    )

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._max_line_bytes = max_line_bytes
        self._decoder = msgspec.json.Decoder(_Line)
        self._encoder = msgspec.json.Encoder()
        self._next_id = 1
        self._open: dict[int, str] = {}
        self._fault: str | None = None
        self.greeting: Greeting | None = None
        self.oob = False

    def negotiation(self) -> tuple[int, bytes]:
        """The command that ends the negotiation, to be sent after the greeting; takes ``oob`` when it is offered."""
        offered = self.greeting is not None and "oob" in self.greeting.capabilities
        command = self.encode("qmp_capabilities", {"enable": ["oob"]} if offered else None)
        self.oob = offered
        return command

    def encode(self, command: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """``command`` as its id and one line of bytes.

        Raises:
            InvalidStateError: Before the greeting, or after a fault.
        """
        if self._fault is not None or self.greeting is None:
            raise InvalidStateError(
                f"{command} can't be sent: {self._fault or 'QEMU has not greeted yet'}",
                state="broken" if self._fault else "greeting",
                wanted="ready",
            )
        number = self._next_id
        self._next_id += 1
        verb = "exec-oob" if self.oob and command in _OOB_COMMANDS else "execute"
        document: dict[str, Any] = {verb: command, "id": number}
        if arguments:
            document["arguments"] = arguments
        line = self._encoder.encode(document) + b"\n"
        self._open[number] = command
        return number, line

    def command_of(self, number: int) -> str:
        """The command sent with that id, while its answer is awaited."""
        return self._open.get(number, "")

    @property
    def open_count(self) -> int:
        """Commands whose answer has not come."""
        return len(self._open)

    def feed(self, data: bytes) -> list[Message]:
        """Messages that ``data`` completes, in order. Does not block.

        Raises:
            HypervisorError: What came is no QMP; messages before it in ``data`` are lost, and so is the conversation.
            UnsupportedError: The greeting is of a QEMU before version 5.
            InvalidStateError: After a fault.
        """
        if self._fault is not None:
            raise InvalidStateError(f"no more is read: {self._fault}", state="broken", wanted="ready")
        self._buffer += data
        messages: list[Message] = []
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._scanned = 0
            if len(line) > self._max_line_bytes:
                self._too_long()
            if line:
                messages.append(self._read(line))
        self._scanned = len(self._buffer)
        if self._scanned > self._max_line_bytes:
            self._too_long()
        return messages

    def _too_long(self) -> NoReturn:
        self._break(f"QEMU sent a line of more than {self._max_line_bytes} bytes")

    def _break(self, text: str, cause: Exception | None = None) -> NoReturn:
        self._fault = text
        self._buffer.clear()
        self._open.clear()
        raise HypervisorError(text) from cause

    def _read(self, line: bytes) -> Message:
        try:
            document = self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._break(f"QEMU sent what is no QMP: {line[:_QUOTED]!r}", error)
        if document.event is not None:
            return Event(name=document.event, data=document.data, time_us=_time_us(document.timestamp))
        if document.hello is not None:
            return self._greet(document.hello)
        if document.error is None and document.value is msgspec.UNSET:
            self._break(f"QEMU sent what is neither answer nor event: {line[:_QUOTED]!r}")
        return self._answer(document, line)

    def _greet(self, hello: _Hello) -> Greeting:
        if self.greeting is not None:
            self._break("QEMU greeted twice")
        qemu = hello.version.qemu
        version = (qemu.major, qemu.minor, qemu.micro)
        try:
            check_version(version)
        except Exception as error:
            self._fault = str(error)
            raise
        self.greeting = Greeting(
            version=version,
            package=hello.version.package,
            capabilities=frozenset(name for name in hello.capabilities if isinstance(name, str)),
        )
        return self.greeting

    def _answer(self, document: _Line, line: bytes) -> Reply:
        number = document.id
        command = self._open.pop(number, None) if type(number) is int else None
        if command is None:
            # Also QEMU's complaint about a line that it could not parse: ours are well-formed, so the stream is broken.
            self._break(f"QEMU answered a command that was not sent: {line[:_QUOTED]!r}")
        if document.error is None:
            return Reply(id=number, value=document.value)
        fault = document.error
        error = QmpError(f"QEMU refused {command}: {fault.desc}", command=command, error_class=fault.class_)
        return Reply(id=number, error=error)


def matches(data: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether an event's ``data`` has all of ``wanted``."""
    return all(key in data and data[key] == value for key, value in wanted.items())


def _time_us(time: _Time | None) -> int | None:
    # QEMU gives -1 for both when its clock failed.
    return None if time is None or time.seconds < 0 else time.seconds * 1_000_000 + time.microseconds
