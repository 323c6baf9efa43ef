"""Signals that end the command line, let in where the library waits and nowhere else.

An exception that a signal raises just anywhere could fall between a thing's making and the note that it has to be undone, or into
the undoing itself. So a signal is an exception only at a wait of the blocking face (where a task would be cancelled too), or outside
the library; one that comes at another moment is kept and tried again in a few milliseconds. While something is undone, it waits until
all is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["Interrupted", "let_in"]

_AGAIN_S = 0.005
_PACKAGE = str(Path(__file__).absolute().parent.parent)
_FACE = os.path.join(_PACKAGE, "_sync") + os.sep
_WAITS = os.path.join(_PACKAGE, "_compat") + os.sep
_UNDOING = frozenset(
    {
        "UndoStack.unwind",
        "UndoStack._unwind",
        "Sandbox.stop",
        "Sandbox._stop",
        "Qemu.stop",
        "Transaction._undo",
    }
)


class Interrupted(KeyboardInterrupt):
    """The signal ``number`` came. What was made is undone as it passes."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def let_in(*numbers: int) -> Iterator[None]:
    """Raise :class:`Interrupted` for these signals where that is safe; at the end also for one that was kept.

    Needs: the main thread.
    """
    kept = 0
    again: threading.Timer | None = None

    def come(number: int, frame: FrameType | None) -> None:
        nonlocal kept, again
        kept = kept or number
        if may_raise(frame):
            number, kept = kept, 0
            raise Interrupted(number)
        again = threading.Timer(_AGAIN_S, signal.pthread_kill, (threading.main_thread().ident, number))
        again.start()

    before = {number: signal.signal(number, come) for number in numbers}
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, _ignore)
        if again is not None:
            again.cancel()
            again.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if kept:
        raise Interrupted(kept)


def _ignore(number: int, frame: FrameType | None) -> None:
    """What was kept is told at the end."""


def may_raise(frame: FrameType | None) -> bool:
    """Whether the code that ``frame`` runs may be left by an exception there."""
    inner = ""
    innermost_found = False
    at_wait = True
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_FACE):
            if not innermost_found:
                innermost_found = True
                at_wait = inner.startswith(_WAITS)
            if frame.f_code.co_qualname in _UNDOING:
                return False
        inner = file
        frame = frame.f_back
    return at_wait
