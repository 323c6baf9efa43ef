"""The QMP client against a real QEMU, on both faces."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from casemate._async.hypervisor.qemu import AsyncQemu
from casemate._sync.hypervisor.qemu import Qemu
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.errors import QmpError, VmmExitedError
from casemate.hypervisor import BlockDevice, GuestAssets

pytestmark = pytest.mark.qemu
StartDriver = Callable[..., Awaitable[AsyncQemu]]
PAUSED = ("-S",)


async def test_execute_when_the_answer_is_large_then_it_comes_whole(start_driver: StartDriver) -> None:
    client = await (await start_driver(qemu_arguments=PAUSED)).qmp()

    schema = await client.execute("query-qmp-schema", timeout_s=10)

    assert len(schema) > 500
    assert client.version is not None
    assert client.version[0] >= 5


async def test_execute_when_a_descriptor_goes_with_it_then_qemu_has_it(start_driver: StartDriver) -> None:
    client = await (await start_driver(qemu_arguments=PAUSED)).qmp()
    reader, writer = os.pipe()
    try:
        await client.execute("getfd", {"fdname": "pipe"}, timeout_s=5, borrow_fds=[writer])
        await client.execute("closefd", {"fdname": "pipe"}, timeout_s=5)
        with pytest.raises(QmpError):
            await client.execute("getfd", {"fdname": "none"}, timeout_s=5)
    finally:
        os.close(reader)
        os.close(writer)


async def test_execute_many_when_eight_are_sent_at_once_then_each_has_its_answer(
    start_driver: StartDriver,
) -> None:
    client = await (await start_driver(qemu_arguments=PAUSED)).qmp()

    outcomes = await client.execute_many(
        [("query-name", None), ("bogus", None), *[("query-status", None)] * 6], timeout_s=5
    )

    assert outcomes[0] == {"name": "sandbox-t1"}
    assert isinstance(outcomes[1], QmpError)
    assert outcomes[1].error_class == "CommandNotFound"
    assert [outcome["running"] for outcome in outcomes[2:]] == [False] * 6


async def test_wait_event_when_qemu_stops_then_it_comes(start_driver: StartDriver) -> None:
    driver = await start_driver()
    client = await driver.qmp()
    stopped = client.expect("STOP")

    await driver.pause()

    assert (await stopped.wait(5)).time_us is not None


@contextlib.contextmanager
def running(state_root: Path, settings: Settings, assets: GuestAssets) -> Iterator[Qemu]:
    """A blocking driver with QEMU running. No fixture: pytest would hold it, and its descriptor, past the leak check."""
    config = SandboxConfig(accel="tcg", memory_mib=64, qemu_arguments=PAUSED)
    driver = Qemu.create(config, settings, sandbox_id="t1")
    driver.plan(assets)
    try:
        driver.prepare(state_root)
        driver.start()
        yield driver
    finally:
        driver.stop()


def test_blocking_when_threads_share_the_driver_then_negotiation_happens_once(
    state_root: Path, settings: Settings, assets: GuestAssets, disk: BlockDevice
) -> None:
    with running(state_root, settings, assets) as driver, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: driver.qmp().execute("query-status", timeout_s=10), range(40)))

        assert {answer["running"] for answer in answers} == {False}
        assert driver.attach_block(disk).pci_path == "0f/00"


def test_blocking_when_qemu_is_killed_then_the_wait_fails_within_100_ms(
    state_root: Path, settings: Settings, assets: GuestAssets
) -> None:
    with running(state_root, settings, assets) as driver, ThreadPoolExecutor(1) as pool:
        awaited = driver.qmp().expect("STOP")
        wait = pool.submit(awaited.wait, 30)
        driver.process.send_signal(9)
        killed = time.monotonic()
        error = wait.exception(5)

        assert time.monotonic() - killed < 0.1
        assert isinstance(error, VmmExitedError)
        assert "SIGKILL" in str(error)
