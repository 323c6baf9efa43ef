"""A driver on a guest of a few bytes, and its end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from casemate import _core
from casemate._async.hypervisor.qemu import AsyncQemu
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.hypervisor import BlockDevice, GuestAssets
from tests.support.tiny_guest import write_tiny_kernel

MakeDriver = Callable[..., Awaitable[AsyncQemu]]


@pytest.fixture
def assets(tmp_path: Path) -> GuestAssets:
    (tmp_path / "initrd").write_bytes(b"x" * 512)
    return GuestAssets(
        kernel=str(write_tiny_kernel(tmp_path / "kernel", "tiny guest\r\n")), initrd=str(tmp_path / "initrd")
    )


@pytest.fixture
def disk(tmp_path: Path) -> BlockDevice:
    path = tmp_path / "disk,one.img"
    path.write_bytes(bytes(1 << 20))
    return BlockDevice(id="c1", path=str(path), serial="c1")


@pytest.fixture
async def start_driver(
    tmp_path: Path, state_root: Path, settings: Settings, assets: GuestAssets
) -> AsyncIterator[MakeDriver]:
    """Starts a driver with the given configuration; each is stopped at the end and leaves nothing in its directory."""
    async with AsyncExitStack() as stack:
        made = 0

        async def start(
            *, disks: tuple[BlockDevice, ...] = (), guest: GuestAssets = assets, **config: Any
        ) -> AsyncQemu:
            nonlocal made
            made += 1
            directory = state_root / f"vm{made}"
            directory.mkdir()
            driver = await AsyncQemu.create(
                SandboxConfig(accel="tcg", memory_mib=64, **config), settings, sandbox_id=f"t{made}"
            )
            stack.push_async_callback(_stop, driver, directory)
            driver.plan(guest, disks)
            await driver.prepare(directory)
            await driver.start()
            return driver

        yield start


async def _stop(driver: AsyncQemu, directory: Path) -> None:
    await driver.stop()
    assert os.listdir(directory) == []
    directory.rmdir()


@pytest.fixture(scope="session", autouse=True)
def _native_threads() -> None:
    """The threads that make and watch children live as long as the process: they are no leak of the first test."""
    _core.spawn(["true"]).wait(10.0)
