"""The blocking QMP client with several threads on one connection: one of them reads for all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from casemate._sync.qmp import QmpClient
from casemate.errors import DeadlineExceededError, HypervisorError, VmmExitedError
from tests.support.fake_qmp import SILENCE, FakeQmp


def explain(error: HypervisorError) -> Exception:
    return VmmExitedError("QEMU is gone", status=-9)


@pytest.fixture
def qemu() -> Iterator[FakeQmp]:
    ours, theirs = socket.socketpair()
    with FakeQmp(theirs) as fake:
        fake.ours = ours  # type: ignore[attr-defined]
        yield fake
    ours.close()


@pytest.fixture
def client(qemu: FakeQmp) -> Iterator[QmpClient]:
    made = QmpClient(qemu.ours, explain=explain)  # type: ignore[attr-defined]
    made.negotiate(timeout_s=5)
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def test_execute_when_many_threads_ask_then_each_gets_its_own_answer(
    qemu: FakeQmp, client: QmpClient, pool: ThreadPoolExecutor
) -> None:
    qemu.answers["echo"] = lambda command: command["arguments"]["n"]

    answers = list(pool.map(lambda n: client.execute("echo", {"n": n}, timeout_s=10), range(400)))

    assert answers == list(range(400))


def test_wait_event_when_one_thread_waits_then_others_are_not_held_up(
    qemu: FakeQmp, client: QmpClient, pool: ThreadPoolExecutor
) -> None:
    awaited = pool.submit(client.wait_event, "STOP", timeout_s=10)
    started = time.monotonic()

    for _ in range(20):
        client.execute("query-status", timeout_s=5)

    assert time.monotonic() - started < 2.0
    assert not awaited.done()
    qemu.event("STOP")
    assert awaited.result(5).name == "STOP"


def test_deadline_when_the_reading_thread_gives_up_then_another_reads_on(
    qemu: FakeQmp, client: QmpClient, pool: ThreadPoolExecutor
) -> None:
    qemu.answers["stop"] = SILENCE
    short = pool.submit(client.execute, "stop", timeout_s=0.2)
    qemu.await_command("stop")
    long = pool.submit(client.wait_event, "RESUME", timeout_s=10)

    with pytest.raises(DeadlineExceededError, match="did not answer stop"):
        short.result(5)
    qemu.event("RESUME")

    assert long.result(5).name == "RESUME"


def test_deadline_when_another_thread_reads_then_it_still_holds(
    qemu: FakeQmp, client: QmpClient, pool: ThreadPoolExecutor
) -> None:
    qemu.answers["stop"] = SILENCE
    long = pool.submit(client.wait_event, "RESUME", timeout_s=10)
    started = time.monotonic()

    with pytest.raises(DeadlineExceededError):
        client.execute("stop", timeout_s=0.1)

    assert time.monotonic() - started < 2.0
    qemu.event("RESUME")
    long.result(5)


def test_end_when_many_threads_wait_then_all_fail_at_once_with_the_cause(
    qemu: FakeQmp, client: QmpClient, pool: ThreadPoolExecutor
) -> None:
    qemu.answers["stop"] = SILENCE
    waits = [pool.submit(client.execute, "stop", timeout_s=30) for _ in range(6)]
    qemu.await_command("stop")

    qemu.close()
    ended = time.monotonic()

    for wait in waits:
        with pytest.raises(VmmExitedError):
            wait.result(5)
    assert time.monotonic() - ended < 1.0


def test_close_when_another_thread_waits_then_it_ends(
    qemu: FakeQmp, client: QmpClient, pool: ThreadPoolExecutor
) -> None:
    waiting = threading.Event()

    def wait() -> object:
        awaited = client.expect("STOP")
        waiting.set()
        return awaited.wait(30)

    future = pool.submit(wait)
    waiting.wait(5)
    client.close()

    with pytest.raises(VmmExitedError):
        future.result(5)
