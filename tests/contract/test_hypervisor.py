"""What every driver keeps to, on each of them: the mock, the real one on a fake VMM, the real one on a real VMM."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from casemate._async.hypervisor import AsyncHypervisor
from casemate._async.hypervisor.mock import AsyncMockHypervisor
from casemate._async.hypervisor.qemu import AsyncQemu
from casemate.errors import (
    AlreadyExistsError,
    InvalidStateError,
    NotFoundError,
    ResourceExhaustedError,
    VmmExitedError,
)
from casemate.hypervisor import BlockDevice, GuestAssets

pytestmark = pytest.mark.timeout(90)

MakeDriver = Callable[..., Awaitable[AsyncHypervisor]]
Disks = tuple[BlockDevice, ...]


@pytest.fixture
def directory(state_root: Path) -> Path:
    path = state_root / "vm"
    path.mkdir()
    return path


async def started(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path, disks: Disks = ()
) -> AsyncHypervisor:
    driver = await make_driver()
    driver.plan(assets, disks)
    await driver.prepare(directory)
    await driver.start()
    return driver


@pytest.mark.parametrize("kind", [AsyncQemu, AsyncMockHypervisor])
def test_driver_then_has_every_member_of_the_protocol_with_its_parameters(kind: type) -> None:
    for name, member in vars(AsyncHypervisor).items():
        if name.startswith("_"):
            continue
        assert hasattr(kind, name), name
        if not callable(member):
            continue
        wanted = inspect.signature(member).parameters
        found = inspect.signature(getattr(kind, name)).parameters
        assert list(found) == list(wanted)
        assert inspect.iscoroutinefunction(getattr(kind, name)) == inspect.iscoroutinefunction(member)


async def test_plan_when_disks_are_given_then_each_has_a_place_and_nothing_is_made(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path, disks: Disks
) -> None:
    driver = await make_driver()

    addresses = driver.plan(assets, disks)

    assert [address.id for address in addresses] == ["d0", "d1", "d2", "d3"]
    assert [address.pci_path for address in addresses] == ["03", "04", "05", "06"]
    assert [address.serial for address in addresses] == ["d0", "d1", "d2", "d3"]
    assert os.listdir(directory) == []
    with pytest.raises(InvalidStateError):
        _ = driver.process


async def test_steps_when_out_of_order_or_twice_then_are_refused(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path
) -> None:
    driver = await make_driver()

    with pytest.raises(InvalidStateError):
        await driver.prepare(directory)
    with pytest.raises(InvalidStateError):
        await driver.start()
    driver.plan(assets, ())
    await driver.prepare(directory)
    with pytest.raises(InvalidStateError):
        await driver.prepare(directory)
    await driver.start()
    with pytest.raises(InvalidStateError):
        await driver.start()


async def test_start_then_the_process_that_was_told_runs_and_the_agents_address_is_in_the_directory(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path
) -> None:
    driver = await make_driver()
    driver.plan(assets, ())

    transport = await driver.prepare(directory)
    process = await driver.start()

    assert process.pid == driver.process.pid
    assert Path(f"/proc/{process.pid}").is_dir()
    assert await driver.exit_error(0.01) is None
    assert transport.url.startswith(("vsock://", f"hvsock://{directory}/"))
    assert driver.accel_name
    assert driver.accel_reason


async def test_exit_error_when_the_vmm_is_killed_then_says_so_and_calls_fail(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path
) -> None:
    driver = await started(make_driver, assets, directory)

    os.kill(driver.process.pid, signal.SIGKILL)
    error = await driver.exit_error(10)

    assert error is not None
    assert error.status == -signal.SIGKILL
    assert "SIGKILL" in str(error)
    with pytest.raises(VmmExitedError):
        await driver.pause()


async def test_pause_when_resumed_then_the_vmm_goes_on(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path
) -> None:
    driver = await started(make_driver, assets, directory)
    assert driver.capabilities.pause

    await driver.pause()
    await driver.resume()

    assert await driver.exit_error(0.01) is None


async def test_attach_block_when_ports_are_taken_then_refused(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path, disks: Disks
) -> None:
    driver = await started(make_driver, assets, directory)
    assert driver.capabilities.block_hotplug

    paths = [(await driver.attach_block(disk)).pci_path for disk in disks[:2]]

    assert paths == ["0f/00", "10/00"]
    with pytest.raises(AlreadyExistsError):
        await driver.attach_block(disks[0])
    with pytest.raises(ResourceExhaustedError):
        await driver.attach_block(disks[2])
    with pytest.raises(NotFoundError):
        await driver.detach_block("nothing")


async def test_stop_when_called_twice_at_once_then_the_vmm_is_gone_and_the_directory_empty(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path
) -> None:
    driver = await started(make_driver, assets, directory)
    process = driver.process

    await asyncio.gather(driver.stop(), driver.stop())
    await driver.stop()

    assert process.wait(5) is not None
    assert os.listdir(directory) == []


async def test_stop_when_only_prepared_or_nothing_was_done_then_leaves_nothing(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path
) -> None:
    untouched, prepared = await make_driver(), await make_driver()
    prepared.plan(assets, ())
    await prepared.prepare(directory)

    await untouched.stop()
    await prepared.stop()

    assert os.listdir(directory) == []


async def test_stop_when_the_vmm_stands_still_then_it_is_gone_all_the_same(
    make_driver: MakeDriver, assets: GuestAssets, directory: Path
) -> None:
    driver = await started(make_driver, assets, directory)
    process = driver.process
    process.send_signal(signal.SIGSTOP)

    await driver.stop()

    assert process.wait(5) == -signal.SIGKILL
