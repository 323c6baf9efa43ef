"""The QMP client against a fake of QEMU's side."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from casemate._async.qmp import AsyncQmpClient
from casemate.errors import (
    DeadlineExceededError,
    HypervisorError,
    InvalidStateError,
    QmpError,
    UnsupportedError,
    VmmExitedError,
)
from tests.support.fake_qmp import SILENCE, FakeQmp, Refusal


async def explain(error: HypervisorError) -> Exception:
    return VmmExitedError("QEMU is gone", status=-9)


async def keep(error: HypervisorError) -> Exception:
    return error


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


Sockets = tuple[socket.socket, socket.socket]


async def test_negotiate_when_qemu_greets_then_the_version_is_known_and_oob_taken(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:
        client = AsyncQmpClient(sockets[0], explain=keep)

        greeting = await client.negotiate(timeout_s=5)

        assert greeting.version == client.version == (7, 2, 0)
        assert qemu.commands[0]["arguments"] == {"enable": ["oob"]}
        client.close()


async def test_negotiate_when_qemu_is_too_old_then_is_refused(sockets: Sockets) -> None:
    with FakeQmp(sockets[1], version=(4, 2, 0)):
        client = AsyncQmpClient(sockets[0], explain=explain)

        with pytest.raises(UnsupportedError, match=r"4\.2\.0"):
            await client.negotiate(timeout_s=5)


async def test_negotiate_when_qemu_says_nothing_then_ends_at_the_deadline(sockets: Sockets) -> None:
    client = AsyncQmpClient(sockets[0], explain=keep)
    started = time.monotonic()

    with pytest.raises(DeadlineExceededError):
        await client.negotiate(timeout_s=0.1)

    assert 0.1 <= time.monotonic() - started < 1.0
    client.close()


async def test_negotiate_when_qemu_died_before_it_greeted_then_the_cause_is_told(sockets: Sockets) -> None:
    client = AsyncQmpClient(sockets[0], explain=explain)
    sockets[1].close()

    with pytest.raises(VmmExitedError, match="QEMU is gone"):
        await client.negotiate(timeout_s=5)


async def test_execute_when_refused_then_class_and_text_are_kept(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:
        qemu.answers["device_del"] = Refusal("DeviceNotFound", "Device 'x' not found")
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)

        with pytest.raises(QmpError, match="QEMU refused device_del: Device 'x' not found") as caught:
            await client.execute("device_del", {"id": "x"}, timeout_s=5)

        assert (caught.value.command, caught.value.error_class) == ("device_del", "DeviceNotFound")
        client.close()


async def test_execute_when_no_answer_comes_then_names_the_command_and_drops_the_late_one(
    sockets: Sockets,
) -> None:
    with FakeQmp(sockets[1]) as qemu:
        qemu.answers["stop"] = SILENCE
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)

        with pytest.raises(DeadlineExceededError, match=r"did not answer stop within 0\.05 s") as caught:
            await client.execute("stop", timeout_s=0.05)
        qemu.send({"return": {}, "id": qemu.unanswered[0]})
        answer = await client.execute("cont", timeout_s=5)

        assert caught.value.op == "qmp.stop"
        assert answer == {}
        assert client.late_answers_total == 1
        client.close()


async def test_execute_when_cancelled_then_the_connection_goes_on(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:
        qemu.answers["stop"] = SILENCE
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)
        command = asyncio.create_task(client.execute("stop", timeout_s=5))
        await asyncio.to_thread(qemu.await_command, "stop")

        command.cancel()
        with pytest.raises(asyncio.CancelledError):
            await command

        assert await client.execute("cont", timeout_s=5) == {}
        client.close()


async def test_execute_many_when_one_is_refused_then_the_others_have_their_answers(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:
        qemu.answers |= {"a": 1, "b": Refusal("GenericError", "no"), "c": 3}
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)

        first, second, third = await client.execute_many(
            [("a", None), ("b", None), ("c", {"x": 1})], timeout_s=5
        )

        assert (first, third) == (1, 3)
        assert isinstance(second, QmpError)
        client.close()


async def test_events_when_one_comes_before_the_answer_then_it_is_not_missed(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:

        def delete(command: dict[str, object]) -> object:
            qemu.event("DEVICE_DELETED", path="/machine/x/virtio-backend")
            qemu.event("DEVICE_DELETED", device="other", path="/machine/other")
            qemu.event("DEVICE_DELETED", device="x", path="/machine/x")
            return {}

        qemu.answers["device_del"] = delete
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)
        gone = client.expect("DEVICE_DELETED", match={"device": "x"})

        await client.execute("device_del", {"id": "x"}, timeout_s=5)
        event = await gone.wait(5)

        assert event.data == {"device": "x", "path": "/machine/x"}
        client.close()


async def test_events_when_one_is_awaited_then_commands_go_on(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)
        awaited = asyncio.create_task(client.wait_event("STOP", timeout_s=5))

        assert await client.execute("query-status", timeout_s=5) == {}
        assert not awaited.done()
        qemu.event("STOP")

        assert (await awaited).name == "STOP"
        client.close()


async def test_events_when_none_comes_then_names_what_was_awaited(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]):
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)

        with pytest.raises(DeadlineExceededError, match="no event STOP"):
            await client.wait_event("STOP", timeout_s=0.05)

        client.close()


async def test_end_when_several_wait_then_all_fail_at_once_with_the_cause(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:
        qemu.answers["stop"] = SILENCE
        client = AsyncQmpClient(sockets[0], explain=explain)
        await client.negotiate(timeout_s=5)
        waits = [asyncio.create_task(client.execute("stop", timeout_s=30)) for _ in range(3)]
        waits += [asyncio.create_task(client.wait_event("STOP", timeout_s=30))]
        await asyncio.to_thread(qemu.await_command, "stop")

        qemu.close()
        results = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 1)

        assert [type(result) for result in results] == [VmmExitedError] * 4
        with pytest.raises(VmmExitedError):
            await client.execute("cont", timeout_s=5)
        with pytest.raises(VmmExitedError):
            await client.wait_event("STOP", timeout_s=5)


async def test_end_when_closed_by_us_then_waits_end_and_a_second_close_is_nothing(sockets: Sockets) -> None:
    with FakeQmp(sockets[1]) as qemu:
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)
        wait = asyncio.create_task(client.wait_event("STOP", timeout_s=30))
        await asyncio.sleep(0)

        client.close()
        client.close()

        with pytest.raises(HypervisorError, match="closed"):
            await wait
        assert len(qemu.commands) == 1


@pytest.mark.parametrize(
    "data", [b"garbage\n", b'{"return": {}, "id": 12345}\n', b'{"error": {"desc": "JSON"}}\n']
)
async def test_end_when_qemu_sends_no_qmp_then_waits_end_with_that(sockets: Sockets, data: bytes) -> None:
    with FakeQmp(sockets[1]) as qemu:
        client = AsyncQmpClient(sockets[0], explain=keep)
        await client.negotiate(timeout_s=5)
        wait = asyncio.create_task(client.wait_event("STOP", timeout_s=30))
        await asyncio.sleep(0)

        qemu.send_bytes(data)

        with pytest.raises(HypervisorError, match=r"QEMU (sent|answered)"):
            await wait


async def test_execute_when_qemu_has_not_greeted_then_is_refused(sockets: Sockets) -> None:
    client = AsyncQmpClient(sockets[0], explain=keep)

    with pytest.raises(InvalidStateError):
        await client.execute("stop", timeout_s=1)

    client.close()


async def test_execute_when_qemu_does_not_read_then_ends_at_the_deadline(sockets: Sockets) -> None:
    client = AsyncQmpClient(sockets[0], explain=keep)
    sockets[1].sendall(
        b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}\n'
    )
    with pytest.raises(DeadlineExceededError):
        await client.negotiate(timeout_s=0.05)

    with pytest.raises(DeadlineExceededError):
        await client.execute("x", {"data": "x" * 8_000_000}, timeout_s=0.1)

    client.close()
