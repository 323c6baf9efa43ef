"""Where a signal becomes an exception, on code that says which file it is of."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import casemate
from casemate.cli.interrupts import Interrupted, let_in, may_raise

PACKAGE = Path(casemate.__file__).parent


def function(file: str, body: str, **names: Any) -> Callable[[], Any]:
    """A function that is of ``file`` of the package, as far as its frame says."""
    scope = dict(names)
    exec(compile(body, str(PACKAGE / file), "exec"), scope)
    made: Callable[[], Any] = scope["run"]
    return made


def asked() -> bool:
    """Whether a signal that comes in the caller may raise."""
    frame: FrameType | None = sys._getframe(1)
    return may_raise(frame)


BARE = "def run(): return asked()"
CALLS = "def run(): return inner()"


def test_may_raise_when_outside_the_library_then_yes() -> None:
    assert asked()
    assert function("cli/run.py", BARE, asked=asked)()


def test_may_raise_when_the_face_is_at_work_then_no() -> None:
    assert not function("_sync/sandbox.py", BARE, asked=asked)()
    inner = function("persist/store.py", BARE, asked=asked)
    assert not function("_sync/sandbox.py", CALLS, inner=inner)()


def test_may_raise_when_the_face_waits_then_yes() -> None:
    inner = function("_compat/blocking.py", BARE, asked=asked)
    assert function("_sync/sandbox.py", CALLS, inner=inner)()
    deep = function("_compat/blocking.py", CALLS, inner=function("images/unpack.py", BARE, asked=asked))
    assert function("_sync/sandbox.py", CALLS, inner=deep)()


def test_may_raise_when_something_is_undone_then_no_wait_lets_it_in() -> None:
    wait = function("_compat/blocking.py", BARE, asked=asked)
    undoing = "class UndoStack:\n  def _unwind(self): return inner()\nrun = UndoStack()._unwind"
    assert not function("_sync/undo.py", undoing, inner=wait)()


def test_let_in_when_a_signal_comes_at_work_then_it_is_raised_at_the_next_wait() -> None:
    steps: list[str] = []

    def wait() -> None:
        steps.append("waits")
        signal.sigtimedwait([], 5)

    waiting = function("_compat/blocking.py", CALLS, inner=wait)
    body = "def run():\n  os.kill(os.getpid(), 15)\n  steps.append('made')\n  steps.append('noted')\n  waiting()\n  steps.append('on')"
    work = function("_sync/sandbox.py", body, os=os, steps=steps, waiting=waiting)

    with pytest.raises(Interrupted) as caught, let_in(signal.SIGTERM):
        work()

    assert caught.value.number == signal.SIGTERM
    assert steps == ["made", "noted", "waits"]


def test_let_in_when_no_wait_follows_then_it_is_raised_at_the_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    work = function("_sync/sandbox.py", "def run(): os.kill(os.getpid(), 15)", os=os)
    ended: list[str] = []

    with pytest.raises(Interrupted), let_in(signal.SIGTERM):
        work()
        ended.append("block")

    assert signal.getsignal(signal.SIGTERM) is before


def test_let_in_when_nothing_comes_then_handlers_are_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    with let_in(signal.SIGTERM, signal.SIGINT):
        pass

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
