"""The agent's client against a peer made by hand."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from casemate import _core
from casemate.errors import (
    AgentConnectionError,
    AgentRpcError,
    DeadlineExceededError,
    HostError,
    InternalError,
    InvalidConfigError,
    InvalidStateError,
    ResourceExhaustedError,
)
from tests.support.ttrpc_peer import Peer, field, number, parse

SERVICE = "grpc.AgentService"
MAX_FRAME = 4 << 20


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def connection(peer: Peer) -> Iterator[_core.Connection]:
    connection = _core.Connection(peer.client_fd())
    yield connection
    connection.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def raw(connection: _core.Connection, payload: bytes = b"", timeout_s: float | None = None) -> int:
    return connection.submit_raw("s", "m", payload, timeout_s=timeout_s)


def test_submit_when_json_then_protobuf_goes_out_and_json_comes_back(
    peer: Peer, connection: _core.Connection
) -> None:
    slot = connection.submit(SERVICE, "WaitProcess", b'{"container_id":"c","exec_id":"e"}', timeout_s=5)
    request = peer.receive()
    assert (request.stream, request.flags, request.service, request.method) == (
        slot,
        0,
        SERVICE,
        "WaitProcess",
    )
    assert parse(request.payload) == {1: [b"c"], 2: [b"e"]}
    assert request.timeout_ns == 5_000_000_000
    peer.answer(slot, number(1, 7))
    assert json.loads(connection.wait(slot))["status"] == 7


def test_submit_when_bytes_are_in_the_document_then_they_are_base64(
    peer: Peer, connection: _core.Connection
) -> None:
    document = {"container_id": "c", "data": base64.b64encode(b"\0\xff").decode()}
    connection.submit(SERVICE, "WriteStdin", json.dumps(document).encode())
    assert parse(peer.receive().payload)[3] == [b"\0\xff"]


@pytest.mark.parametrize(
    ("service", "method", "document", "path"),
    [
        (SERVICE, "Nope", b"{}", "method"),
        ("grpc.Nope", "WaitProcess", b"{}", "method"),
        (SERVICE, "WaitProcess", b'{"container":"c"}', "line 1, column 12"),
        (SERVICE, "WaitProcess", b'{"container_id":5}', "line 1, column 17"),
    ],
)
def test_submit_when_the_document_does_not_fit_then_invalid_with_its_place(
    connection: _core.Connection, service: str, method: str, document: bytes, path: str
) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        connection.submit(service, method, document)
    assert caught.value.path == path


def test_submit_when_called_again_then_streams_are_odd_and_increase(
    peer: Peer, connection: _core.Connection
) -> None:
    slots = [raw(connection) for _ in range(3)]
    assert [peer.receive().stream for _ in slots] == slots == [1, 3, 5]


def test_submit_when_too_large_for_a_frame_then_invalid_and_nothing_is_sent(
    peer: Peer, connection: _core.Connection
) -> None:
    with pytest.raises(InvalidConfigError):
        raw(connection, bytes(MAX_FRAME))
    slot = raw(connection, b"small")
    assert peer.receive().stream == slot == 1


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_submit_when_the_timeout_is_no_time_then_invalid(
    connection: _core.Connection, timeout_s: float
) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        raw(connection, timeout_s=timeout_s)
    assert caught.value.path == "timeout_s"


def test_wait_when_answers_come_in_another_order_then_each_slot_has_its_own(
    peer: Peer, connection: _core.Connection
) -> None:
    slots = [raw(connection) for _ in range(4)]
    for slot in reversed(slots):
        peer.answer(slot, b"%d" % slot)
    assert [connection.wait(slot) for slot in slots] == [b"1", b"3", b"5", b"7"]


def test_wait_when_called_twice_then_the_slot_is_closed(peer: Peer, connection: _core.Connection) -> None:
    slot = raw(connection)
    peer.answer(slot)
    assert connection.wait(slot) == b""
    with pytest.raises(InvalidStateError) as caught:
        connection.wait(slot)
    assert (caught.value.state, caught.value.wanted) == ("closed", "open")


def test_wait_when_the_agent_refuses_then_rpc_error_with_method_code_and_details(
    peer: Peer, connection: _core.Connection
) -> None:
    slot = connection.submit(SERVICE, "StartContainer", b"{}")
    peer.refuse(slot, 5, "no such container")
    with pytest.raises(AgentRpcError) as caught:
        connection.wait(slot)
    error = caught.value
    assert (error.method, error.code, error.details) == ("StartContainer", 5, "no such container")
    assert str(error) == "StartContainer: NotFound: no such container"


def test_wait_when_the_answer_is_no_message_then_rpc_error_and_the_connection_stays(
    peer: Peer, connection: _core.Connection
) -> None:
    broken = connection.submit(SERVICE, "WaitProcess", b"{}")
    peer.send_frame(broken, b"\xff")
    with pytest.raises(AgentRpcError) as caught:
        connection.wait(broken)
    assert caught.value.code == 15
    slot = connection.submit(SERVICE, "WaitProcess", b"{}")
    peer.answer(slot, b"\x0a\xff")
    with pytest.raises(AgentRpcError):
        connection.wait(slot)
    assert not connection.closed


def test_wait_when_the_answer_is_too_large_then_that_slot_fails_and_the_next_comes(
    peer: Peer, connection: _core.Connection, pool: ThreadPoolExecutor
) -> None:
    large, small = raw(connection), raw(connection)
    peer.send_frame(large, b"", length=MAX_FRAME + 1)
    with pytest.raises(AgentRpcError) as caught:
        connection.wait(large)
    assert caught.value.code == 8

    def send_the_rest() -> None:
        peer.socket.sendall(bytes(MAX_FRAME + 1))
        peer.answer(small, b"on")

    rest = pool.submit(send_the_rest)
    assert connection.wait(small) == b"on"
    rest.result(10)


def test_wait_when_frames_of_other_kinds_come_then_ignored(peer: Peer, connection: _core.Connection) -> None:
    slot = raw(connection)
    for kind in (1, 3, 99):
        peer.send_frame(slot, b"x", kind=kind)
    peer.answer(slot, b"on")
    assert connection.wait(slot) == b"on"


def test_wait_when_the_deadline_passes_then_deadline_exceeded_and_the_late_answer_is_counted(
    peer: Peer, connection: _core.Connection
) -> None:
    slot = raw(connection, timeout_s=0.05)
    with pytest.raises(DeadlineExceededError) as caught:
        connection.wait(slot)
    assert caught.value.deadline_s == pytest.approx(0.05)
    assert 0.05 <= caught.value.waited_s < 5
    peer.answer(slot, b"late")
    following = raw(connection)
    peer.answer(following, b"on")
    assert connection.wait(following) == b"on"
    assert connection.dropped_answers_total == 1


def test_cancel_when_the_answer_comes_late_then_dropped_and_counted(
    peer: Peer, connection: _core.Connection
) -> None:
    cancelled, other = raw(connection), raw(connection)
    connection.cancel(cancelled)
    connection.cancel(cancelled)
    peer.answer(cancelled, b"late")
    peer.answer(other, b"on")
    assert connection.wait(other) == b"on"
    assert connection.dropped_answers_total == 1


def test_cancel_when_another_thread_waits_then_its_wait_ends(
    connection: _core.Connection, pool: ThreadPoolExecutor
) -> None:
    slot = raw(connection)
    waiting = pool.submit(connection.wait, slot)
    connection.cancel(slot)
    with pytest.raises(InvalidStateError):
        waiting.result(10)


def test_wait_any_when_some_have_come_then_those_else_empty_at_the_timeout(
    peer: Peer, connection: _core.Connection
) -> None:
    slots = [raw(connection) for _ in range(3)]
    assert connection.wait_any(slots, 0.02) == []
    assert connection.wait_any([], 5) == []
    peer.answer(slots[1], b"1")
    assert connection.wait_any(slots, 5) == [slots[1]]
    assert connection.wait_any(slots, 0) == [slots[1]]
    assert connection.wait(slots[1]) == b"1"


def test_wait_any_when_the_answer_is_there_and_no_time_is_given_then_found(
    peer: Peer, connection: _core.Connection
) -> None:
    slot = raw(connection)
    peer.answer(slot, b"1")
    assert connection.wait_any([slot], 0) == [slot]


def test_wait_when_the_connection_breaks_then_every_waiter_ends(
    peer: Peer, connection: _core.Connection, pool: ThreadPoolExecutor
) -> None:
    slots = [raw(connection) for _ in range(8)]
    waiting = [pool.submit(connection.wait, slot) for slot in slots]
    for _ in slots:
        peer.receive()
    peer.close()
    for future in waiting:
        with pytest.raises(AgentConnectionError):
            future.result(10)
    assert connection.closed
    with pytest.raises(AgentConnectionError):
        raw(connection)


def test_wait_when_several_threads_contend_then_each_gets_its_own_answer(
    peer: Peer, connection: _core.Connection, pool: ThreadPoolExecutor
) -> None:
    rounds, threads = 100, 6

    def serve() -> None:
        for _ in range(rounds * threads):
            request = peer.receive()
            peer.answer(request.stream, request.payload * 3)

    def work(thread: int) -> None:
        for number_ in range(rounds):
            payload = b"%d:%d " % (thread, number_) * (number_ * 20)
            assert connection.wait(raw(connection, payload)) == payload * 3

    server = pool.submit(serve)
    workers: list[Future[None]] = [pool.submit(work, thread) for thread in range(threads)]
    for worker in workers:
        worker.result(25)
    server.result(10)


def test_wait_when_the_watched_process_ends_then_connection_error_within_milliseconds(
    peer: Peer, pool: ThreadPoolExecutor
) -> None:
    child = _core.spawn(["sleep", "60"])
    connection = _core.Connection(peer.client_fd(), watch=child)
    waiting = [pool.submit(connection.wait, raw(connection)) for _ in range(2)]
    for _ in waiting:
        peer.receive()
    killed = time.monotonic()
    child.send_signal(signal.SIGKILL)
    for future in waiting:
        with pytest.raises(AgentConnectionError, match="process that serves it has ended"):
            future.result(10)
    assert time.monotonic() - killed < 0.1
    connection.close()
    child.wait(10)


def test_submit_when_the_peer_does_not_read_then_kept_and_sent_while_waiting(
    peer: Peer, connection: _core.Connection, pool: ThreadPoolExecutor
) -> None:
    payload = bytes(range(256)) * 8192
    slots = [raw(connection, payload) for _ in range(3)]
    assert connection.wants_write

    def serve() -> list[bool]:
        whole = []
        for _ in slots:
            request = peer.receive()
            whole.append(request.payload == payload)
            peer.answer(request.stream)
        return whole

    serving = pool.submit(serve)
    assert [connection.wait(slot) for slot in slots] == [b""] * 3
    assert serving.result(10) == [True] * 3
    assert not connection.wants_write


def test_submit_when_the_peer_never_reads_then_memory_is_bounded(connection: _core.Connection) -> None:
    payload = bytes(MAX_FRAME - 100)
    # 64 MiB are kept, and what the last one exceeds them by.
    for _ in range(16 + 1):
        raw(connection, payload)
    with pytest.raises(ResourceExhaustedError):
        raw(connection, payload)


def test_streams_when_used_then_bytes_go_as_they_are(peer: Peer, connection: _core.Connection) -> None:
    slot = connection.submit_write_stdin("c", "e", b"\0in")
    request = peer.receive()
    assert (request.method, parse(request.payload)) == ("WriteStdin", {1: [b"c"], 2: [b"e"], 3: [b"\0in"]})
    peer.answer(slot, number(1, 3))
    assert connection.wait(slot) == b"3"
    for stderr, method in ((False, "ReadStdout"), (True, "ReadStderr")):
        slot = connection.submit_read("c", "e", 4096, stderr=stderr)
        request = peer.receive()
        assert (request.method, parse(request.payload)) == (method, {1: [b"c"], 2: [b"e"], 3: [4096]})
        peer.answer(slot, field(1, b"\xffout"))
        assert connection.wait(slot) == b"\xffout"
    slot = connection.submit_read("c", "e", 4096)
    peer.answer(slot)
    assert connection.wait(slot) == b""


def test_fail_when_slots_are_open_then_they_end_with_the_text(
    peer: Peer, connection: _core.Connection
) -> None:
    answered, open_slot = raw(connection), raw(connection)
    peer.answer(answered, b"before")
    assert connection.wait(answered) == b"before"
    assert connection.fail("the guest panicked") == [open_slot]
    assert connection.fail("again") == []
    with pytest.raises(AgentConnectionError, match="the guest panicked"):
        connection.wait(open_slot)


def test_close_when_others_wait_then_they_end_and_the_peer_sees_the_end(
    peer: Peer, connection: _core.Connection, pool: ThreadPoolExecutor
) -> None:
    waiting = pool.submit(connection.wait, raw(connection))
    peer.receive()
    connection.close()
    connection.close()
    with pytest.raises(AgentConnectionError):
        waiting.result(10)
    assert (connection.closed, connection.fileno()) == (True, -1)
    with pytest.raises(EOFError):
        peer.receive()


def test_connection_when_the_descriptor_is_bad_then_host_error() -> None:
    with pytest.raises(HostError) as caught:
        _core.Connection(-1)
    assert (caught.value.errno, caught.value.target) == (9, "descriptor -1")


async def test_add_reader_when_on_a_loop_then_answers_deadlines_and_the_end_arrive(peer: Peer) -> None:
    loop = asyncio.get_running_loop()
    connection = _core.Connection(peer.client_fd())
    futures: dict[int, asyncio.Future[bytes]] = {}

    def on_readable() -> None:
        for slot, outcome in connection.on_readable():
            if isinstance(outcome, bytes):
                futures.pop(slot).set_result(outcome)
            else:
                futures.pop(slot).set_exception(outcome)
        if connection.closed:
            loop.remove_reader(connection.fileno())

    def call(payload: bytes, timeout_s: float | None = None) -> asyncio.Future[bytes]:
        slot = raw(connection, payload, timeout_s)
        futures[slot] = loop.create_future()
        return futures[slot]

    loop.add_reader(connection.fileno(), on_readable)
    calls = [call(b"%d" % index) for index in range(32)]
    for request in [peer.receive() for _ in calls]:
        peer.answer(request.stream, request.payload)
    assert await asyncio.gather(*calls) == [b"%d" % index for index in range(32)]

    late = call(b"", timeout_s=0.02)
    loop.call_later(0.025, on_readable)
    with pytest.raises(DeadlineExceededError):
        await late

    refused = call(b"")
    peer.receive()
    peer.refuse(peer.receive().stream, 12, "m method")
    with pytest.raises(AgentRpcError):
        await refused

    left = [call(b"") for _ in range(3)]
    peer.close()
    for future in left:
        with pytest.raises(AgentConnectionError):
            await future
    connection.close()


async def test_add_writer_when_the_socket_was_full_then_on_writable_sends_the_rest(peer: Peer) -> None:
    loop = asyncio.get_running_loop()
    connection = _core.Connection(peer.client_fd())
    payload = bytes(1 << 20)
    slot = raw(connection, payload)
    assert connection.wants_write
    sent = loop.create_future()

    def on_writable() -> None:
        connection.on_writable()
        if not connection.wants_write:
            loop.remove_writer(connection.fileno())
            sent.set_result(None)

    loop.add_writer(connection.fileno(), on_writable)
    request = await asyncio.to_thread(peer.receive)
    await asyncio.wait_for(sent, 10)
    assert (request.stream, request.payload) == (slot, payload)
    connection.close()


def test_wait_when_a_signal_handler_raises_then_the_wait_ends_and_the_slot_stays_open(
    peer: Peer, connection: _core.Connection
) -> None:
    slot = raw(connection)

    class Woken(Exception):
        pass

    def raise_woken(_number: int, _frame: object) -> None:
        raise Woken

    previous = signal.signal(signal.SIGUSR1, raise_woken)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(Woken):
            connection.wait(slot)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
    peer.answer(slot, b"on")
    assert connection.wait(slot) == b"on"


def test_connection_when_used_after_a_fork_then_internal_error(connection: _core.Connection) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # The child: nothing of the test's frames may run on in it.
        try:
            raw(connection)
            text = b"no error"
        except InternalError as error:
            text = str(error).encode()
        os.write(writer, text)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    assert b"another process than the one that made it" in text


def test_import_when_only_the_native_module_is_loaded_then_no_thread_starts() -> None:
    code = "import os, casemate._core; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
