"""Undoing goes on after failures and is not cut short."""

from __future__ import annotations

import asyncio

import pytest

from casemate._async.undo import AsyncUndoStack, raise_with
from casemate._sync.undo import UndoStack


def test_unwind_when_a_step_fails_then_the_others_run_in_reverse_and_failures_are_returned() -> None:
    ran: list[str] = []

    def fails() -> None:
        ran.append("second")
        raise OSError("busy")

    stack = UndoStack()
    stack.push("first", lambda: ran.append("first"))
    stack.push("second", fails)
    stack.push("third", lambda: ran.append("third"))
    failures = stack.unwind()
    assert ran == ["third", "second", "first"]
    assert [str(one) for one in failures] == ["busy"]
    assert failures[0].__notes__ == ["while undoing: second"]
    assert stack.unwind() == []


async def test_unwind_when_cancelled_then_it_is_finished_first() -> None:
    ran: list[str] = []
    begun = asyncio.Event()
    go_on = asyncio.Event()

    async def slow() -> None:
        begun.set()
        await go_on.wait()
        ran.append("slow")

    async def quick() -> None:
        ran.append("quick")

    stack = AsyncUndoStack()
    stack.push("quick", quick)
    stack.push("slow", slow)
    task = asyncio.create_task(stack.unwind())
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ran == ["slow", "quick"]


def test_raise_with_when_undoing_failed_too_then_the_cause_comes_first() -> None:
    cause, other = ValueError("cause"), OSError("undo")
    group = raise_with(cause, [other])
    assert isinstance(group, ExceptionGroup)
    assert group.exceptions == (cause, other)
    assert raise_with(cause, []) is cause
