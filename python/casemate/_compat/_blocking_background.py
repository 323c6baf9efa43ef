"""Work beside the caller's, and what it hands over, between threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Background", "Mailbox"]

T = TypeVar("T")


class Background:
    """A function that runs in a thread of its own from now on."""

    __slots__ = ("_error", "_function", "_thread")

    def __init__(self, function: Callable[[], None], name: str) -> None:
        self._function = function
        self._error: BaseException | None = None
        # A program that forgets its sandbox must still be able to end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def is_own(self) -> bool:
        """Whether it is this very work that asks."""
        return threading.current_thread() is self._thread

    def join(self) -> None:
        """Wait until it is over. Raises: what ended it."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self._error = error


class Mailbox(Generic[T]):
    """Items from one thread to another, at most ``capacity`` of them."""

    __slots__ = ("_capacity", "_changed", "_closed", "_items")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> bool:
        """Hand over; False when it is full or closed. Does not wait."""
        with self._changed:
            if self._closed or len(self._items) >= self._capacity:
                return False
            self._items.append(item)
            self._changed.notify()
            return True

    def close(self) -> None:
        """Nothing more will come. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get(self) -> T | None:
        """The next item; None when it is closed and empty."""
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            return self._items.popleft() if self._items else None
