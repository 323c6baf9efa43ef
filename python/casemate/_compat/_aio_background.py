"""Work beside the caller's, and what it hands over, on asyncio's event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

__all__ = ["Background", "Mailbox"]

T = TypeVar("T")


class Background:
    """A function that runs as a task from now on."""

    __slots__ = ("_task",)

    def __init__(self, function: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        self._task = asyncio.get_running_loop().create_task(function(), name=name)

    def is_own(self) -> bool:
        """Whether it is this very work that asks."""
        return asyncio.current_task() is self._task

    async def join(self) -> None:
        """Wait until it is over. Raises: what ended it."""
        await asyncio.wait([self._task])
        self._task.result()


class Mailbox(Generic[T]):
    """Items from one to another, at most ``capacity`` of them."""

    __slots__ = ("_capacity", "_changed", "_closed", "_items")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, item: T) -> bool:
        """Hand over; False when it is full or closed. Does not wait."""
        if self._closed or len(self._items) >= self._capacity:
            return False
        self._items.append(item)
        self._changed.set()
        return True

    def close(self) -> None:
        """Nothing more will come. Idempotent."""
        self._closed = True
        self._changed.set()

    async def get(self) -> T | None:
        """The next item; None when it is closed and empty."""
        while not self._items and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return self._items.popleft() if self._items else None
