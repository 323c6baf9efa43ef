"""What the watch over a sandbox tells, and what it costs: on a fake VMM, which can be killed, stopped and made to panic."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time

import pytest

from casemate import (
    AgentConnectionError,
    AsyncSandbox,
    CasemateError,
    DeadlineExceededError,
    Event,
    EventKind,
    InvalidStateError,
    MonitorConfig,
    Sandbox,
    VmmExitedError,
)
from tests.support.fake_vm import FakeVm

pytestmark = pytest.mark.root


OFTEN = MonitorConfig(interval_s=0.05, timeout_s=0.2, failures=2)
SELDOM = MonitorConfig(interval_s=600)
PANIC = ["sh", "-c", "echo c > /proc/sysrq-trigger"]


def start(fake_vm: FakeVm, monitor: MonitorConfig) -> Sandbox:
    return Sandbox.create(
        fake_vm.config("watched", monitor=monitor),
        containers=(fake_vm.container(),),
        start=True,
        settings=fake_vm.settings,
    )


def test_events_when_vmm_is_killed_then_told_within_100_ms_and_the_iteration_ends(fake_vm: FakeVm) -> None:
    with start(fake_vm, SELDOM) as sandbox:
        events = sandbox.events()
        os.kill(sandbox.vmm_pid, signal.SIGKILL)
        killed_at = time.monotonic()
        first = next(events)
        assert time.monotonic() - killed_at < 0.1 * fake_vm.settings.timeout_factor + 0.2
        assert (first.kind, first.sandbox_id) == (EventKind.VMM_EXITED, "watched")
        assert isinstance(first.error, VmmExitedError)
        assert first.error.status == -signal.SIGKILL
        assert list(events) == []
        with pytest.raises(CasemateError):
            sandbox.container().exec(["true"])


def test_events_when_the_guest_panics_then_its_words_are_told_before_the_vmms_end(fake_vm: FakeVm) -> None:
    with start(fake_vm, SELDOM) as sandbox:
        events = sandbox.events()
        with pytest.raises(CasemateError):
            sandbox.container().exec(PANIC, capture=True)
        told = list(events)
    assert [event.kind for event in told] == [EventKind.GUEST_PANICKED, EventKind.VMM_EXITED]
    assert told[0].text == "the guest kernel panicked: sysrq triggered crash"
    assert "sysrq triggered crash" in told[1].text


def test_events_when_the_vmm_stands_still_then_agent_is_given_up_and_requests_fail_at_once(
    fake_vm: FakeVm,
) -> None:
    with start(fake_vm, OFTEN) as sandbox:
        container, events = sandbox.container(), sandbox.events()
        reading = container.exec(["cat"])
        os.kill(sandbox.vmm_pid, signal.SIGSTOP)
        told = [next(events) for _ in range(3)]
        assert [event.kind for event in told] == [
            EventKind.UNHEALTHY,
            EventKind.UNHEALTHY,
            EventKind.AGENT_DEAD,
        ]
        assert "VMM does not answer as it should (1 of 2)" in told[0].text
        assert isinstance(told[2].error, DeadlineExceededError)
        given_up_at = time.monotonic()
        for call in (lambda: container.exec(["true"]), reading.stdout.read, reading.wait):
            with pytest.raises(AgentConnectionError):
                call()
        assert time.monotonic() - given_up_at < 0.5
        stopped_at = time.monotonic()
        sandbox.stop()
        # A VMM that does not quit is killed at the deadline; its agent is not waited for.
        assert time.monotonic() - stopped_at < 2.0 * fake_vm.settings.timeout_factor + 1.5


def test_events_when_only_the_agent_is_silent_then_told_which_side_it_was(fake_vm: FakeVm) -> None:
    fake_vm.script["faults"] = {"Check": "silence"}
    with start(fake_vm, OFTEN) as sandbox:
        told = list(itertools.islice(sandbox.events(), 3))
    assert told[0].text.startswith("the agent does not answer as it should (1 of 2)")
    assert told[2].kind is EventKind.AGENT_DEAD
    assert not fake_vm.asked().count("DestroySandbox")


def test_events_when_the_sandbox_is_paused_then_nobody_is_asked(fake_vm: FakeVm) -> None:
    with start(fake_vm, OFTEN) as sandbox:
        events = sandbox.events()
        sandbox.pause()
        before = fake_vm.asked().count("Check")
        time.sleep(0.5)
        assert fake_vm.asked().count("Check") <= before + 1
        sandbox.resume()
        assert sandbox.container().exec(["true"], capture=True).exit_code == 0
        events.close()
        assert events.dropped_total == 0


def test_watch_when_nobody_wants_events_then_nobody_is_asked_and_rounds_are_not_more_than_told(
    fake_vm: FakeVm,
) -> None:
    with start(fake_vm, MonitorConfig(interval_s=0.2)) as sandbox:
        time.sleep(0.5)
        assert fake_vm.asked().count("Check") == 0
        started = time.monotonic()
        sandbox.events()
        sandbox.events()
        time.sleep(1.0)
        rounds = (time.monotonic() - started) / 0.2
        assert 1 <= fake_vm.asked().count("Check") <= rounds
        assert fake_vm.asked().count("query-status") <= rounds + 1


def test_reader_when_it_does_not_read_then_128_are_kept_and_the_rest_is_dropped(fake_vm: FakeVm) -> None:
    config = MonitorConfig(interval_s=0.001, timeout_s=5.0, failures=300)
    fake_vm.script["faults"] = {"Check": "refuse"}
    with start(fake_vm, config) as sandbox:
        events, seen, enough = sandbox.events(), [0], threading.Event()

        def count(_: Event) -> None:
            seen[0] += 1
            if seen[0] == 200:
                enough.set()

        sandbox.on_event(count)
        assert enough.wait(60)
    assert len(list(events)) == 128
    assert events.dropped_total >= 72


def test_callback_when_it_fails_or_is_cancelled_then_the_others_are_told(fake_vm: FakeVm) -> None:
    told: list[EventKind] = []
    with start(fake_vm, SELDOM) as sandbox:
        events = sandbox.events()

        def fail(_: Event) -> None:
            raise RuntimeError("a fault of the caller's")

        sandbox.on_event(fail)
        sandbox.on_event(lambda event: told.append(event.kind))
        cancel = sandbox.on_event(lambda event: told.append(event.kind))
        cancel()
        cancel()
        os.kill(sandbox.vmm_pid, signal.SIGKILL)
        assert [event.kind for event in events] == [EventKind.VMM_EXITED]
    assert told == [EventKind.VMM_EXITED]


def test_stop_when_watched_then_readers_end_and_no_event_tells_of_it(fake_vm: FakeVm) -> None:
    sandbox = start(fake_vm, OFTEN)
    readers = [sandbox.events(), sandbox.events()]
    sandbox.stop()
    sandbox.stop()
    assert [list(reader) for reader in readers] == [[], []]
    with pytest.raises(InvalidStateError):
        sandbox.events()


def test_stop_when_an_event_asks_for_it_then_the_sandbox_goes(fake_vm: FakeVm) -> None:
    sandbox = start(fake_vm, SELDOM)
    stopped = threading.Event()

    def stop(_: Event) -> None:
        sandbox.stop()
        stopped.set()

    sandbox.on_event(stop)
    os.kill(sandbox.vmm_pid, signal.SIGKILL)
    assert stopped.wait(20)
    assert not list((fake_vm.settings.state_root / "sandboxes").iterdir())


async def test_events_when_under_a_loop_then_tasks_are_told_and_the_watch_ends_with_the_sandbox(
    fake_vm: FakeVm,
) -> None:
    async with await AsyncSandbox.create(
        fake_vm.config("loop", monitor=OFTEN),
        containers=(fake_vm.container(),),
        start=True,
        settings=fake_vm.settings,
    ) as sandbox:
        first, second = sandbox.events(), sandbox.events()
        await asyncio.sleep(0.2)
        os.kill(sandbox.vmm_pid, signal.SIGSTOP)
        kinds = []
        async for event in first:
            kinds.append(event.kind)
            if event.kind is EventKind.AGENT_DEAD:
                break
        assert kinds == [EventKind.UNHEALTHY, EventKind.UNHEALTHY, EventKind.AGENT_DEAD]
        os.kill(sandbox.vmm_pid, signal.SIGKILL)
        assert [event.kind async for event in second] == [*kinds, EventKind.VMM_EXITED]
    assert [task for task in asyncio.all_tasks() if task.get_name() == "casemate-monitor"] == []


async def test_stop_when_the_vmm_stands_still_and_a_round_is_under_way_then_it_ends(fake_vm: FakeVm) -> None:
    config = MonitorConfig(interval_s=0.05, timeout_s=600)
    sandbox = await AsyncSandbox.create(fake_vm.config("hung", monitor=config), settings=fake_vm.settings)
    sandbox.events()
    os.kill(sandbox.vmm_pid, signal.SIGSTOP)
    await asyncio.sleep(0.3)
    started = time.monotonic()
    await sandbox.aclose()
    # DestroySandbox, then quit, each until its deadline.
    assert time.monotonic() - started < 2 * 2.0 * fake_vm.settings.timeout_factor + 2


def test_stop_when_the_vmm_stands_still_and_a_thread_asks_it_then_both_end(fake_vm: FakeVm) -> None:
    config = MonitorConfig(interval_s=0.05, timeout_s=600)
    sandbox = Sandbox.create(fake_vm.config("hung", monitor=config), settings=fake_vm.settings)
    sandbox.events()
    os.kill(sandbox.vmm_pid, signal.SIGSTOP)
    time.sleep(0.3)
    started = time.monotonic()
    sandbox.close()
    assert time.monotonic() - started < 2 * 2.0 * fake_vm.settings.timeout_factor + 2
