"""The fake of QEMU's side tells the truth: a client that is not ours gets along with it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tests.support.fake_qmp import FakeQmp, Refusal


@pytest.fixture
async def pair() -> AsyncIterator[tuple[QMPClient, FakeQmp]]:
    ours, theirs = socket.socketpair()
    client = QMPClient("independent")
    with FakeQmp(theirs) as fake:
        await client.connect(ours)
        yield client, fake
        await client.disconnect()


async def test_fake_when_an_independent_client_asks_then_it_answers(pair: tuple[QMPClient, FakeQmp]) -> None:
    client, fake = pair
    fake.answers["query-status"] = {"status": "running"}
    fake.answers["bogus"] = Refusal("CommandNotFound", "The command bogus has not been found")

    assert await client.execute("query-status") == {"status": "running"}
    with pytest.raises(ExecuteError, match="bogus") as caught:
        await client.execute("bogus")
    assert caught.value.error.error.class_ == "CommandNotFound"


async def test_fake_when_it_tells_of_an_event_then_an_independent_client_hears_it(
    pair: tuple[QMPClient, FakeQmp],
) -> None:
    client, fake = pair

    with client.listener() as listener:
        fake.event("STOP", reason="x")
        event = await asyncio.wait_for(listener.get(), 5)

    assert event["event"] == "STOP"
    assert event["data"] == {"reason": "x"}
