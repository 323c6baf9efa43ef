"""Dialling an agent that is given up meanwhile."""

from __future__ import annotations

import asyncio
import os
import select
import threading

import pytest

from casemate._async.link import _dialled


async def test_dialled_when_given_up_before_the_socket_comes_then_it_is_closed_when_it_comes() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    reading, writing = os.pipe()

    def dial() -> int:
        begun.set()
        go_on.wait(10)
        return reading

    def dial_to_the_end() -> int:
        try:
            return dial()
        finally:
            ended.set()

    task = asyncio.create_task(_dialled(dial_to_the_end))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await asyncio.to_thread(ended.wait, 10)
    # The write end has an error as soon as nobody holds the other one.
    poll = select.poll()
    poll.register(writing, 0)
    ((_, events),) = await asyncio.to_thread(poll.poll, 10_000)
    assert events & select.POLLERR
    os.close(writing)


async def test_dialled_when_it_is_there_then_its_socket_is_given() -> None:
    assert await _dialled(lambda: 7) == 7


async def test_dialled_when_it_fails_then_the_failure_is_raised() -> None:
    def dial() -> int:
        raise ConnectionRefusedError("no")

    with pytest.raises(ConnectionRefusedError):
        await _dialled(dial)
