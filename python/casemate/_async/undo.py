"""Undo steps, run in reverse when a start fails or a sandbox ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from casemate._compat import aio as compat
from casemate.observe.log import Log

__all__ = ["AsyncUndoStack"]

_log = Log(__name__)


class AsyncUndoStack:
    """Steps that undo what was acquired. Each is idempotent and has a deadline of its own."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], compat.Later[Any]]]] = []

    def push(self, name: str, step: Callable[[], compat.Later[Any]]) -> None:
        """Register a step, in the statement behind the one that acquired."""
        self._steps.append((name, step))

    def forget(self) -> None:
        """Drop every step: what was acquired is another's now."""
        self._steps.clear()

    def push_first(self, name: str, step: Callable[[], compat.Later[Any]]) -> None:
        """Register a step that is run when all others are done."""
        self._steps.insert(0, (name, step))

    async def unwind(self) -> list[BaseException]:
        """Run every step, the last registered first, and go on after failures; return these in order.

        A cancellation of the caller is held back until all are done.
        """
        return await compat.shielded(self._unwind())

    async def _unwind(self) -> list[BaseException]:
        failures: list[BaseException] = []
        while self._steps:
            name, step = self._steps.pop()
            try:
                await step()
            except GeneratorExit:
                raise
            except BaseException as error:
                # An interruption as well: what is not undone now never will be.
                error.add_note(f"while undoing: {name}")
                _log.warning("undo failed", extra={"op": name}, exc_info=error)
                failures.append(error)
        return failures


def raise_with(first: BaseException, others: list[BaseException]) -> BaseException:
    """``first`` alone, or a group with it in front when undoing failed as well."""
    if not others:
        return first
    # A group of ordinary exceptions is one itself: the constructor chooses the class by what it is given.
    return BaseExceptionGroup(str(first), [first, *others])
