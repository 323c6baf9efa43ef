"""One sandbox used by many at once, and many sandboxes at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
import types
from collections.abc import Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from casemate import AsyncSandbox, CasemateError, InvalidStateError, Sandbox, State
from casemate.observe import failpoints
from casemate.persist.store import load_record
from tests.support import leaks
from tests.support.fake_vm import FakeVm

pytestmark = pytest.mark.root

THREADS = 16


@pytest.fixture
def often_switching() -> Iterator[None]:
    """Threads give way between any two bytecodes, so that what is not guarded shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often_switching")
def test_sandbox_when_16_threads_use_it_then_every_answer_is_right_and_the_document_whole(
    fake_vm: FakeVm,
) -> None:
    config = fake_vm.config("threads", hotplug_ports=16)
    with (
        Sandbox.create(
            config, containers=(fake_vm.container(),), start=True, settings=fake_vm.settings
        ) as sandbox,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        main, barrier = sandbox.container("main"), threading.Barrier(THREADS)

        def use(number: int) -> list[str]:
            barrier.wait(10)
            name, said = f"c{number}", []
            for turn in range(3):
                said.append(main.exec(["echo", f"{number} {turn}"], capture=True).stdout)
                own = sandbox.create_container(fake_vm.container(name))
                own.start()
                assert own.exec(["cat"], input=name, capture=True).stdout == name
                assert sandbox.inspect().id == "threads"
                assert {one.id for one in load_record(fake_vm.settings, "threads").containers} >= {"main"}
                own.remove()
            return said

        results = list(pool.map(use, range(THREADS)))
        assert results == [[f"{number} {turn}\n" for turn in range(3)] for number in range(THREADS)]
        assert [one.id for one in sandbox.containers] == ["main"]
        assert [one.id for one in load_record(fake_vm.settings, "threads").containers] == ["main"]


async def test_sandbox_when_50_tasks_change_it_then_containers_and_document_agree(fake_vm: FakeVm) -> None:
    config = fake_vm.config("tasks", hotplug_ports=16)
    async with await AsyncSandbox.create(
        config, containers=(fake_vm.container(),), start=True, settings=fake_vm.settings
    ) as sandbox:
        room = asyncio.Semaphore(15)

        async def use(number: int) -> str:
            async with room:
                own = await sandbox.create_container(fake_vm.container(f"c{number}"))
                await own.start()
                said = (await own.exec(["echo", str(number)], capture=True)).stdout
                if number % 2:
                    await own.remove()
                else:
                    await own.kill()
                    await own.wait(10)
                    await own.remove()
            return said

        said = await asyncio.gather(*(use(number) for number in range(50)))
        assert said == [f"{number}\n" for number in range(50)]
        assert [one.id for one in sandbox.containers] == ["main"]
        assert [one.id for one in load_record(fake_vm.settings, "tasks").containers] == ["main"]


@pytest.mark.usefixtures("often_switching")
def test_stop_when_many_call_it_at_once_then_all_return_when_it_is_over(fake_vm: FakeVm) -> None:
    sandbox = Sandbox.create(fake_vm.config("stopped"), settings=fake_vm.settings)
    pid, barrier = sandbox.vmm_pid, threading.Barrier(THREADS)

    def stop(_: int) -> tuple[bool, bool]:
        barrier.wait(10)
        sandbox.stop()
        return Path(f"/proc/{pid}").exists(), (fake_vm.settings.state_root / "sandboxes" / "stopped").exists()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert set(pool.map(stop, range(THREADS))) == {(False, False)}
    assert fake_vm.asked().count("DestroySandbox") == 1
    assert fake_vm.asked().count("quit") == 1


def test_state_when_a_container_is_being_made_then_it_is_told_at_once(fake_vm: FakeVm) -> None:
    with Sandbox.create(
        fake_vm.config("asked"), containers=(fake_vm.container(),), start=True, settings=fake_vm.settings
    ) as sandbox:
        made_to_wait, goes_on = threading.Event(), threading.Event()

        def stand() -> None:
            made_to_wait.set()
            assert goes_on.wait(20)

        with (
            failpoints.calling("agent.create_container.before", stand),
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            making = pool.submit(sandbox.create_container, fake_vm.container("second"))
            assert made_to_wait.wait(20)
            try:
                assert sandbox.state is State.RUNNING
                assert [one.id for one in sandbox.inspect().containers] == ["main"]
                assert [one.id for one in sandbox.containers] == ["main"]
                assert sandbox.container("main").exec(["true"], capture=True).exit_code == 0
                (info,) = Sandbox.list(settings=fake_vm.settings)
                assert info.alive
            finally:
                goes_on.set()
            assert making.result(20).id == "second"


def test_state_when_a_sandbox_is_being_made_then_others_see_it(fake_vm: FakeVm) -> None:
    seen: list[tuple[str, bool, State | None]] = []

    def look() -> None:
        (info,) = Sandbox.list(settings=fake_vm.settings)
        seen.append((info.id, info.alive, None if info.record is None else info.record.state))

    with (
        failpoints.calling("sandbox.connect", look),
        Sandbox.create(fake_vm.config("made"), settings=fake_vm.settings),
    ):
        look()
    assert seen == [("made", True, State.READY), ("made", True, State.RUNNING)]


@types.coroutine
def cancelled_at(work: Coroutine[Any, Any, Any], moment: int) -> Generator[Any, Any, Any]:
    """``work``, whose task is cancelled when it waits for the ``moment``-th time."""
    waits = 0
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            waited_for = work.send(value) if error is None else work.throw(error)
        except StopIteration as done:
            return done.value
        waits += 1
        if waits == moment:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        value = error = None
        try:
            value = yield waited_for
        except BaseException as caught:
            error = caught


async def outcome_of_cancelled(fake_vm: FakeVm, moment: int) -> str:
    """What becomes of a create that is cancelled at a wait."""

    async def create() -> AsyncSandbox:
        made: AsyncSandbox = await cancelled_at(
            AsyncSandbox.create(
                fake_vm.config("cancelled"),
                containers=(fake_vm.container(),),
                start=True,
                settings=fake_vm.settings,
            ),
            moment,
        )
        return made

    try:
        sandbox = await create()
    except asyncio.CancelledError:
        return "cancelled"
    await sandbox.aclose()
    return "made"


async def test_create_when_cancelled_at_any_of_its_waits_then_nothing_stays_and_the_name_is_free(
    fake_vm: FakeVm,
) -> None:
    # The threads of a loop are made on first use and stay with it.
    await asyncio.gather(*(asyncio.to_thread(os.getpid) for _ in range(64)))
    await outcome_of_cancelled(fake_vm, 0)

    def take() -> leaks.Snapshot:
        return leaks.take_snapshot(whole_host=True, state_root=fake_vm.settings.state_root)

    outcomes: list[str] = []
    while not outcomes or outcomes[-1] == "cancelled":
        before = take()
        outcomes.append(await outcome_of_cancelled(fake_vm, len(outcomes) + 1))
        await asyncio.sleep(0)
        assert leaks.find_leaks(before, take) == [], f"cancelled at wait {len(outcomes)}"
    # Image, driver, assets, boot, answers: a start waits at least so often.
    assert len(outcomes) >= 5


async def test_create_when_ten_are_started_together_then_all_come_up_and_go(fake_vm: FakeVm) -> None:
    async def one(number: int) -> str:
        async with await AsyncSandbox.create(
            fake_vm.config(f"ten-{number}"),
            containers=(fake_vm.container(),),
            start=True,
            settings=fake_vm.settings,
        ) as sandbox:
            return (await sandbox.container().exec(["echo", sandbox.id], capture=True)).stdout

    said = await asyncio.gather(*(one(number) for number in range(10)))

    assert said == [f"ten-{number}\n" for number in range(10)]
    assert list((fake_vm.settings.state_root / "sandboxes").iterdir()) == []


def test_create_when_two_want_one_name_at_once_then_one_has_it_and_the_other_is_told(fake_vm: FakeVm) -> None:
    barrier = threading.Barrier(2)

    def create(_: int) -> Sandbox | CasemateError:
        barrier.wait(10)
        try:
            return Sandbox.create(fake_vm.config("one"), settings=fake_vm.settings)
        except CasemateError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(create, range(2)))
    (sandbox,) = [one for one in results if isinstance(one, Sandbox)]
    (error,) = [one for one in results if not isinstance(one, Sandbox)]
    with sandbox:
        assert type(error).__name__ == "AlreadyExistsError"
        assert sandbox.inspect().id == "one"


def test_sandbox_when_stopped_while_others_use_it_then_they_are_told_and_it_goes(fake_vm: FakeVm) -> None:
    sandbox = Sandbox.create(
        fake_vm.config("used"), containers=(fake_vm.container(),), start=True, settings=fake_vm.settings
    )
    main = sandbox.container()
    reads = [main.exec(["cat"]) for _ in range(4)]
    waiting = threading.Barrier(5)

    def read(number: int) -> type[BaseException | None]:
        waiting.wait(10)
        try:
            reads[number].stdout.read()
        except CasemateError as error:
            return type(error)
        return type(None)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        told = [pool.submit(read, number) for number in range(4)]
        waiting.wait(10)
        sandbox.stop()
        # The guest ended them, or the connection went: they are told either way.
        assert all(issubclass(one.result(10), (CasemateError, type(None))) for one in told)
    with pytest.raises(InvalidStateError):
        sandbox.create_container(fake_vm.container("late"))
