"""An agent that means harm, or is broken: each wait ends with a typed error in its time, memory stays bounded, others go on."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate import _core
from casemate._compat import aio
from casemate.errors import (
    AgentConnectionError,
    AgentRpcError,
    CasemateError,
    DeadlineExceededError,
    ResourceExhaustedError,
)
from tests.support.ttrpc_peer import Peer, field, number

SERVICE = "grpc.AgentService"
DEADLINE_S = 0.3
# A wait that does not end by its deadline is caught by this and the suite's own limit.
LATE_S = 10.0
RESPONSE = 2
RESOURCE_EXHAUSTED, DATA_LOSS = 8, 15
MIB = 1 << 20


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096


@contextmanager
def connected() -> Iterator[tuple[Peer, _core.Connection]]:
    peer = Peer()
    connection = _core.Connection(peer.client_fd())
    try:
        yield peer, connection
    finally:
        connection.close()
        peer.close()


def head(stream: int, length: int, kind: int = RESPONSE, flags: int = 0) -> bytes:
    return struct.pack(">IIBB", length, stream, kind, flags)


def frame(stream: int, data: bytes, kind: int = RESPONSE) -> bytes:
    return head(stream, len(data), kind) + data


def outcome(connection: _core.Connection, slot: int) -> CasemateError | bytes:
    """How the call ended, within its time."""
    started = time.monotonic()
    try:
        return connection.wait(slot)
    except CasemateError as error:
        return error
    finally:
        assert time.monotonic() - started < LATE_S


# What the agent sends in place of an answer to stream 1, whether it hangs up then, and how the call ends.
Attack = tuple[bytes, bool, type[CasemateError], int | None]
ATTACKS: dict[str, Attack] = {
    "nothing": (b"", False, DeadlineExceededError, None),
    "hangs_up": (b"", True, AgentConnectionError, None),
    "length_of_4_gib": (head(1, 2**32 - 1), False, AgentRpcError, RESOURCE_EXHAUSTED),
    "length_just_too_much": (head(1, 4 * MIB + 1), False, AgentRpcError, RESOURCE_EXHAUSTED),
    "length_that_never_comes": (head(1, 4 * MIB) + b"x", False, DeadlineExceededError, None),
    "wrong_stream": (frame(3, field(2, b"x")), False, DeadlineExceededError, None),
    "stream_zero": (frame(0, field(2, b"x")), False, DeadlineExceededError, None),
    "even_stream": (frame(2, field(2, b"x")), False, DeadlineExceededError, None),
    "own_request": (frame(1, field(1, b"s"), kind=1), False, DeadlineExceededError, None),
    "data_of_a_stream": (frame(1, b"x", kind=3), False, DeadlineExceededError, None),
    "unknown_kind": (frame(1, b"x", kind=99), False, DeadlineExceededError, None),
    "cut_in_the_head": (head(1, 5)[:7], True, AgentConnectionError, None),
    "cut_in_the_data": (frame(1, field(2, b"whole"))[:-2], True, AgentConnectionError, None),
    "no_message": (frame(1, b"\xff" * 20), False, AgentRpcError, DATA_LOSS),
    "message_cut_short": (frame(1, field(2, b"whole")[:-2]), False, AgentRpcError, DATA_LOSS),
    "text_not_utf8": (
        frame(1, field(1, number(1, 5) + field(2, b"\xff\xfe"))),
        False,
        AgentRpcError,
        DATA_LOSS,
    ),
    "code_that_is_none": (frame(1, field(1, number(1, 2**31 - 1))), False, AgentRpcError, 2**31 - 1),
    "answer_no_message": (frame(1, field(2, b"\xff" * 9)), False, AgentRpcError, DATA_LOSS),
}


def attack(peer: Peer, data: bytes, hangs_up: bool) -> None:
    peer.socket.sendall(data)
    if hangs_up:
        peer.socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("name", ATTACKS)
def test_wait_when_the_agent_is_hostile_then_a_typed_error_in_time(name: str) -> None:
    data, hangs_up, kind, code = ATTACKS[name]
    with connected() as (peer, connection):
        slot = connection.submit(SERVICE, "WaitProcess", b"{}", timeout_s=DEADLINE_S)
        peer.receive()
        attack(peer, data, hangs_up)
        ended = outcome(connection, slot)
        assert type(ended) is kind
        assert getattr(ended, "code", None) == code


@pytest.mark.parametrize("name", ATTACKS)
async def test_await_when_the_agent_is_hostile_then_a_typed_error_in_time(name: str) -> None:
    data, hangs_up, kind, code = ATTACKS[name]
    peer = Peer()
    connection = aio.AgentConnection(peer.client_fd())
    call = asyncio.ensure_future(connection.call(SERVICE, "WaitProcess", b"{}", DEADLINE_S))
    await asyncio.sleep(0)
    peer.receive()
    attack(peer, data, hangs_up)
    with pytest.raises(kind) as caught:
        await asyncio.wait_for(call, LATE_S)
    assert getattr(caught.value, "code", None) == code
    connection.close()
    peer.close()


USABLE = [
    name for name, (_, hangs_up, _, _) in ATTACKS.items() if not hangs_up and not name.startswith("length")
]


@pytest.mark.parametrize("name", USABLE)
def test_call_when_an_attack_left_the_frames_whole_then_the_next_call_is_served(name: str) -> None:
    data, _, kind, _ = ATTACKS[name]
    with connected() as (peer, connection):
        first = connection.submit(SERVICE, "WaitProcess", b"{}", timeout_s=DEADLINE_S)
        peer.receive()
        peer.socket.sendall(data)
        assert type(outcome(connection, first)) is kind
        second = connection.submit_raw("s", "m", b"", timeout_s=LATE_S)
        assert peer.receive().stream == second
        peer.answer(second, b"served")
        assert outcome(connection, second) == b"served"


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400), at_once=st.booleans())
def test_wait_when_anything_comes_then_it_ends_with_bytes_or_a_typed_error(
    data: bytes, at_once: bool
) -> None:
    with connected() as (peer, connection):
        slot = connection.submit(SERVICE, "GetGuestDetails", b"{}", timeout_s=LATE_S)
        step = max(len(data), 1) if at_once else 1
        for index in range(0, len(data), step):
            peer.socket.sendall(data[index : index + step])
        peer.socket.shutdown(socket.SHUT_WR)
        assert isinstance(outcome(connection, slot), (bytes, AgentRpcError, AgentConnectionError))


@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=300))
def test_answer_when_its_message_is_anything_then_json_or_data_loss(payload: bytes) -> None:
    with connected() as (peer, connection):
        slot = connection.submit(SERVICE, "GetGuestDetails", b"{}", timeout_s=LATE_S)
        peer.send_frame(slot, field(2, payload) if payload else b"")
        ended = outcome(connection, slot)
        assert (isinstance(ended, bytes) and ended.startswith(b"{")) or (
            isinstance(ended, AgentRpcError) and ended.code == DATA_LOSS
        )


@contextmanager
def flooding(peer: Peer, make: Callable[[], bytes], count: int) -> Iterator[threading.Event]:
    """Send what ``make`` gives ``count`` times from another thread; a closed connection ends it. Gives «all is sent»."""
    sent = threading.Event()

    def send() -> None:
        data = make()
        try:
            for _ in range(count):
                peer.socket.sendall(data)
        except OSError:
            return
        finally:
            sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        thread.join(30)
        assert not thread.is_alive()


def test_memory_when_a_frame_of_4_gib_is_thrown_away_then_bounded_and_another_call_has_its_deadline() -> None:
    with connected() as (peer, connection):
        first, second = (connection.submit_raw("s", "m", b"", timeout_s=LATE_S) for _ in range(2))
        peer.socket.sendall(head(first, 2**32 - 1))
        ended = outcome(connection, first)
        assert isinstance(ended, AgentRpcError) and ended.code == RESOURCE_EXHAUSTED
        before = resident_bytes()
        with flooding(peer, lambda: bytes(MIB), 256) as sent:
            while not sent.is_set():
                assert connection.wait_any([second], 0.01) == []
        assert resident_bytes() - before < 8 * MIB
        connection.close()
        assert type(outcome(connection, second)) is AgentConnectionError


def until_full(peer: Peer) -> None:
    """Wait until the flood has filled what the kernel keeps for the connection."""
    writable = select.poll()
    writable.register(peer.socket, select.POLLOUT)
    while writable.poll(0):
        time.sleep(0.001)


def test_memory_when_answers_for_nobody_flood_then_bounded_and_the_right_one_arrives() -> None:
    with connected() as (peer, connection):
        slot = connection.submit_raw("s", "m", b"", timeout_s=30.0)
        before = resident_bytes()
        with flooding(peer, lambda: frame(99, field(2, bytes(MIB))), 128):
            assert connection.wait_any([slot], 0.5) == []
            while connection.dropped_answers_total < 128:
                connection.wait_any([slot], 0.01)
        assert resident_bytes() - before < 16 * MIB
        peer.answer(slot, b"right")
        assert outcome(connection, slot) == b"right"


def test_memory_when_one_answer_comes_many_times_then_the_first_counts_and_the_rest_is_dropped() -> None:
    with connected() as (peer, connection):
        slot, other = (
            connection.submit_raw("s", "m", b""),
            connection.submit_raw("s", "m", b"", timeout_s=30.0),
        )
        before = resident_bytes()
        peer.answer(slot, b"first")
        with flooding(peer, lambda: frame(slot, field(2, bytes(MIB))), 64):
            while connection.dropped_answers_total < 64:
                connection.wait_any([other], 0.01)
        assert resident_bytes() - before < 16 * MIB
        assert outcome(connection, slot) == b"first"


def test_memory_when_nobody_waits_then_a_flood_stays_with_the_agent() -> None:
    with connected() as (peer, connection):
        slot = connection.submit_read("c", "e", 1 << 20)
        before = resident_bytes()
        with flooding(peer, lambda: frame(slot, field(2, field(1, bytes(MIB)))), 64):
            until_full(peer)
            assert resident_bytes() - before < 8 * MIB
            connection.close()


def test_submit_when_the_agent_reads_nothing_then_bounded_and_refused() -> None:
    with connected() as (_, connection):
        payload = bytes(MIB)
        with pytest.raises(ResourceExhaustedError):
            for _ in range(100):
                connection.submit_raw("s", "m", payload)
        slot = connection.submit_raw("s", "m", b"", timeout_s=DEADLINE_S) if not connection.wants_write else 1
        connection.close()
        assert isinstance(outcome(connection, slot), AgentConnectionError)


def test_wait_when_one_byte_comes_at_a_time_then_the_deadline_holds() -> None:
    with connected() as (peer, connection):
        started = time.monotonic()
        slot = connection.submit_raw("s", "m", b"", timeout_s=DEADLINE_S)
        stop = threading.Event()

        def trickle() -> None:
            for byte in frame(slot, field(2, bytes(100))):
                if stop.wait(0.05):
                    return
                peer.socket.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        ended = outcome(connection, slot)
        stop.set()
        thread.join(10)
        assert type(ended) is DeadlineExceededError
        assert DEADLINE_S <= time.monotonic() - started < DEADLINE_S + 3


def test_wait_when_an_errors_text_is_huge_then_it_is_cut() -> None:
    with connected() as (peer, connection):
        slot = connection.submit_raw("s", "m", b"", timeout_s=LATE_S)
        with flooding(peer, lambda: frame(slot, field(1, number(1, 5) + field(2, "é".encode() * MIB))), 1):
            ended = outcome(connection, slot)
        assert isinstance(ended, AgentRpcError)
        assert len(ended.details) < 70_000 and len(str(ended)) < 70_000
        assert ended.details.startswith("é") and ended.details.endswith("bytes)")
