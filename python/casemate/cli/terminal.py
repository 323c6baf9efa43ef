"""This process's streams and terminal joined to a process in a guest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from casemate.errors import CasemateError
from casemate.observe.log import Log

if TYPE_CHECKING:
    from casemate._sync.process import Process, Reader

__all__ = ["attach"]

_log = Log(__name__)

HANGUP_S = 5.0
"""So long a command has to end by itself after its terminal was closed."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def attach(
    process: Process,
    *,
    stdin: bool,
    wait: Callable[[], int],
    copy: Callable[[], None] | None = None,
    keep_input: bool = False,
) -> int:
    """Join this process's streams to ``process`` until it ended; return its exit status.

    Signals go to it. With a terminal this process's terminal is raw meanwhile, and its size is passed on.

    Args:
        stdin: Pass standard input on.
        wait: Returns the exit status.
        copy: Copies its output to its end; None: from its streams.
        keep_input: Its input stays open when ours is not passed on or at its end: others may write there.

    Blocks: until it ended. Needs: the main thread, for the signals.
    """
    control = _Control(process, stdin=stdin, keep_input=keep_input)
    with _raw_terminal(process.terminal and stdin), _signals() as signals, control.passing(signals):
        if process.terminal:
            _resize(process)
        (copy or (lambda: _copy_outputs(process)))()
        return wait()


def _copy_outputs(process: Process) -> None:
    readers: list[tuple[Reader, int]] = [(process.stdout, 1)]
    if process.stderr is not None:
        readers.append((process.stderr, 2))
    while readers:
        done = process.wait_output([reader for reader, _ in readers])
        for reader, fd in list(readers):
            if reader not in done:
                continue
            piece = reader.take()
            if piece:
                _write_all(fd, piece)
            else:
                readers.remove((reader, fd))


def _write_all(fd: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # A terminal that was closed is a reader that went away.
            raise BrokenPipeError(errno.EPIPE, "the terminal was closed") from error


def _read_input() -> bytes:
    try:
        return os.read(0, 65536)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""  # the terminal was closed


def _resize(process: Process) -> None:
    try:
        packed = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
    except OSError:
        return
    rows, columns, _, _ = struct.unpack("HHHH", packed)
    if rows and columns:
        process.resize(rows, columns)


@contextlib.contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    if not wanted or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        # Now, not when its output was drained: a terminal that nobody reads would keep us for ever, and one that was closed refuses.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, before)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor on which the numbers of arriving signals can be read."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def note(number: int, _frame: FrameType | None) -> None:
        # The wake-up descriptor has carried the number; without a handler the default action would run.
        del number

    numbers = (*_FORWARDED, signal.SIGWINCH)
    before = {number: signal.signal(number, note) for number in numbers}
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


class _Control:
    """A thread that passes input and signals on while the main thread copies output."""

    def __init__(self, process: Process, *, stdin: bool, keep_input: bool) -> None:
        self._process = process
        self._stdin = stdin
        self._keep_input = keep_input
        self._signals = -1
        self._stop_reading = -1
        self._kill_at: float | None = None

    @contextlib.contextmanager
    def passing(self, signals: int) -> Iterator[None]:
        """Do so until the end of the block; numbers of signals are read from ``signals``."""
        self._signals = signals
        self._stop_reading, stop_writing = os.pipe2(os.O_CLOEXEC)
        thread = threading.Thread(target=self._run, name="casemate-input")
        thread.start()
        try:
            yield
        finally:
            os.close(stop_writing)
            thread.join()
            os.close(self._stop_reading)

    def _run(self) -> None:
        try:
            if not self._stdin and not self._keep_input:
                self._process.stdin.close()
            self._loop()
        except CasemateError as error:
            # The process or its machine ended while something was under way to it; the main thread tells its end.
            _log.debug("input ends", extra={"op": "cli.input", "cause": str(error)})

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._stop_reading, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        if self._stdin:
            poll.register(0, select.POLLIN)
        while True:
            left_ms = None
            if self._kill_at is not None:
                left_ms = max(self._kill_at - time.monotonic(), 0.0) * 1e3
            ready = poll.poll(left_ms)
            if not ready:
                self._kill_at = None
                self._process.signal(signal.SIGKILL)
            for fd, _ in ready:
                if fd == self._stop_reading:
                    return
                if fd == self._signals:
                    self._forward(os.read(self._signals, 64))
                elif not self._send(_read_input()):
                    poll.unregister(0)

    def _send(self, data: bytes) -> bool:
        if data:
            self._process.stdin.write(data)
        elif not self._keep_input:
            self._process.stdin.close()
        return bool(data)

    def _forward(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                if self._process.terminal:
                    _resize(self._process)
            else:
                self._process.signal(number)
                if number == signal.SIGHUP and self._process.terminal and not self._keep_input:
                    # Nobody else reaches it: nobody is left who could end a command that does not mind.
                    self._kill_at = time.monotonic() + HANGUP_S
