"""Ten sandboxes of one program at once."""

from __future__ import annotations

import asyncio
import os

import pytest

from casemate import AsyncSandbox, ContainerConfig, SandboxConfig, Settings, TimeoutConfig

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(400)]


async def test_create_when_ten_are_started_together_then_all_come_up_answer_and_go(
    busybox: str, settings: Settings
) -> None:
    # Ten guests that are emulated on two processors come up ten times slower than one.
    patient = TimeoutConfig(boot_s=240, request_s=120, control_s=120, stop_s=20)

    async def live(number: int) -> tuple[str, int]:
        config = SandboxConfig(
            name=f"ten-{number}", memory_mib=128, machine="microvm", timeouts=patient, hotplug_ports=0
        )
        container = ContainerConfig(name="main", image=busybox, command=("cat",))
        async with await AsyncSandbox.create(
            config, containers=(container,), start=True, settings=settings
        ) as sandbox:
            said = await sandbox.container().exec(["hostname"], capture=True)
            return said.stdout, sandbox.vmm_pid

    results = await asyncio.gather(*(live(number) for number in range(10)))

    assert [said for said, _ in results] == [f"ten-{number}\n" for number in range(10)]
    assert len({pid for _, pid in results}) == 10
    assert [pid for _, pid in results if os.path.lexists(f"/proc/{pid}")] == []
    assert list((settings.state_root / "sandboxes").iterdir()) == []
