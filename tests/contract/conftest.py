"""The drivers that one suite is run on."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from casemate._async.hypervisor import AsyncHypervisor
from casemate._async.hypervisor.mock import AsyncMockHypervisor
from casemate._async.hypervisor.qemu import AsyncQemu
from casemate.config.sandbox import SandboxConfig, TimeoutConfig
from casemate.config.settings import Settings
from casemate.hypervisor import BlockDevice, GuestAssets
from tests.support.fake_vm import FakeVm
from tests.support.tiny_guest import write_tiny_kernel

MakeDriver = Callable[..., Awaitable[AsyncHypervisor]]


@pytest.fixture
def assets(tmp_path: Path) -> GuestAssets:
    (tmp_path / "initrd").write_bytes(b"x" * 512)
    kernel = write_tiny_kernel(tmp_path / "kernel", "tiny guest\r\n")
    return GuestAssets(kernel=str(kernel), initrd=str(tmp_path / "initrd"))


@pytest.fixture
def disks(tmp_path: Path) -> tuple[BlockDevice, ...]:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    return tuple(
        BlockDevice(id=f"d{number}", path=str(tmp_path / "disk.img"), serial=f"d{number}")
        for number in range(4)
    )


@pytest.fixture(params=["mock", "fake qemu", pytest.param("qemu", marks=pytest.mark.qemu)])
async def make_driver(
    request: pytest.FixtureRequest, state_root: Path, settings: Settings, fake_vm: FakeVm
) -> AsyncIterator[MakeDriver]:
    """Makes drivers of one kind; each is stopped at the end and leaves its directory empty."""
    async with AsyncExitStack() as stack:

        async def make(**values: Any) -> AsyncHypervisor:
            config = SandboxConfig(
                accel="tcg", memory_mib=64, hotplug_ports=2, timeouts=TimeoutConfig(stop_s=2.0), **values
            )
            driver: AsyncHypervisor
            if request.param == "mock":
                driver = AsyncMockHypervisor(config, sandbox_id="c1")
            elif request.param == "fake qemu":
                config = fake_vm.config("c1", hotplug_ports=2, script={"boot": "silent"}, **values)
                driver = await AsyncQemu.create(config, fake_vm.settings, sandbox_id="c1")
            else:
                driver = await AsyncQemu.create(config, settings, sandbox_id="c1")
            stack.push_async_callback(driver.stop)
            return driver

        yield make
    assert [name for name in os.listdir(state_root) if name != "vm" or os.listdir(state_root / "vm")] == []
