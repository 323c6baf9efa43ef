"""Reading what the keeper logs of a container. Files only: nobody is asked and nothing waits.

Source: Kubernetes, «CRI container log format»: ``<time> <stream> <F|P> <text>``, where P is continued by the next entry of its stream.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

__all__ = ["LOGS", "LogEntry", "LogFiles", "last_lines", "log_path", "parse_time_ns"]

LOGS = "logs"
_READ_BYTES = 1 << 16
_DIGITS_OF_NS = 9


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a container's output.

    Args:
        time_unix_ns: When the keeper read it.
        stream: ``"stdout"`` or ``"stderr"``; a terminal is stdout.
        data: The bytes as the container wrote them, the line feed with them.
    """

    time_unix_ns: int
    stream: str
    data: bytes

    @property
    def ends_line(self) -> bool:
        """Whether it is the end of a line; else the stream's next entry continues it."""
        return self.data.endswith(b"\n")


def log_path(directory: Path, container_id: str) -> Path:
    """Where the log of a container is; a full one becomes ``….1``."""
    return directory / LOGS / f"{container_id}.log"


def parse_time_ns(text: str) -> int:
    """Nanoseconds since 1970 of a UTC time as the log has it. Raises: ValueError."""
    import calendar

    whole, _, fraction = text.removesuffix("Z").partition(".")
    date, _, clock = whole.partition("T")
    fields = (*map(int, date.split("-")), *map(int, clock.split(":")))
    if len(fields) != 6 or not text.endswith("Z"):
        raise ValueError(f"{text!r} is not a time as 2026-11-25T00:33:27.5Z")
    return calendar.timegm((*fields, 0, 0, 0)) * 1_000_000_000 + int(fraction.ljust(_DIGITS_OF_NS, "0")[:9])


class LogFiles:
    """The two files of a log, read in order and on from where they were read to. A context manager.

    A reader that is slower than the container misses what has been rotated away.

    Args:
        path: As of :func:`log_path`.
    """

    __slots__ = ("_fd", "_held", "_offset", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._offset = 0
        self._held = b""

    @property
    def position(self) -> tuple[int, int]:
        """Inode of the file that is read, and how many bytes of it were."""
        return (0 if self._fd < 0 else os.fstat(self._fd).st_ino, self._offset)

    def read(self) -> list[LogEntry]:
        """What has come since, some of it; empty when nothing has. Blocks: for file reads."""
        entries: list[LogEntry] = []
        while not entries:
            piece = self._read_piece()
            if not piece:
                return []
            *lines, self._held = (self._held + piece).split(b"\n")
            entries = [entry for line in lines if (entry := _parse(line)) is not None]
        return entries

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> LogFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_piece(self) -> bytes:
        while True:
            if self._fd < 0 and not self._open_first():
                return b""
            piece = os.read(self._fd, _READ_BYTES)
            if not piece and self._was_replaced():
                # Between the last read and the replacement there may have come something.
                piece = os.read(self._fd, _READ_BYTES)
                if not piece:
                    self._open_next()
                    continue
            if not piece and (size := os.fstat(self._fd).st_size) < self._offset:
                # Half an entry that a full disk did not take whole was cut off again.
                self._offset = os.lseek(self._fd, size, os.SEEK_SET)
                self._held = b""
            self._offset += len(piece)
            return piece

    def _open_first(self) -> bool:
        return self._open(self._older()) or self._open(self.path)

    def _open_next(self) -> None:
        inode, _ = self.position
        was_older = _inode(self._older()) == inode
        self.close()
        self._held = b""
        if not was_older or not self._open(self.path):
            self._open_first()

    def _open(self, path: Path) -> bool:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        self._offset = 0
        return True

    def _was_replaced(self) -> bool:
        now = _inode(self.path)
        return now is not None and now != self.position[0]

    def _older(self) -> Path:
        return self.path.with_name(f"{self.path.name}.1")


def last_lines(entries: Iterable[LogEntry], count: int) -> Iterator[LogEntry]:
    """Those entries that make the last ``count`` lines, parts of lines with them."""
    kept: deque[LogEntry] = deque()
    lines = 0
    for entry in entries:
        kept.append(entry)
        lines += entry.ends_line
        # The part of a line at the end counts as one more.
        while kept and lines + (not kept[-1].ends_line) > count:
            lines -= kept.popleft().ends_line
    yield from kept


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _parse(line: bytes) -> LogEntry | None:
    fields = line.split(b" ", 3)
    try:
        time, stream, tag, text = fields
        return LogEntry(
            time_unix_ns=parse_time_ns(time.decode("ascii")),
            stream=stream.decode("ascii"),
            data=text + (b"\n" if tag == b"F" else b""),
        )
    except ValueError:
        return None  # damaged; the lines behind it are of use all the same
