"""The guest's console as lines, in bounded memory."""

from __future__ import annotations

__all__ = ["MAX_LINE_BYTES", "ConsoleLines"]

MAX_LINE_BYTES = 4096


class ConsoleLines:
    """Cuts a console's bytes into lines of text. A line longer than 4 KiB comes in pieces, empty ones not at all."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that ``data`` ends, in order. Does not block."""
        *whole, self._held = (self._held + data).replace(b"\r", b"\n").split(b"\n")
        while len(self._held) > MAX_LINE_BYTES:
            whole.append(self._held[:MAX_LINE_BYTES])
            self._held = self._held[MAX_LINE_BYTES:]
        return [_text(piece) for line in whole if line for piece in _pieces(line)]

    def end(self) -> list[str]:
        """What is left when nothing more comes. Does not block."""
        last, self._held = self._held, b""
        return [_text(last)] if last else []


def _pieces(line: bytes) -> list[bytes]:
    return [line[start : start + MAX_LINE_BYTES] for start in range(0, len(line), MAX_LINE_BYTES)]


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")
