"""The driver against a real QEMU. The guest is a few bytes, or has not started at all (``-S``)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from msgspec import structs

from casemate._async.hypervisor.qemu import AsyncQemu
from casemate.agent.transport import HybridTransport
from casemate.config.sandbox import SandboxConfig, TimeoutConfig
from casemate.config.settings import Settings
from casemate.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    HostError,
    InvalidConfigError,
    InvalidStateError,
    NotFoundError,
    QmpError,
    ResourceExhaustedError,
    UnsupportedError,
    VmmExitedError,
)
from casemate.hypervisor import BlockDevice, GuestAssets
from tests.support.tiny_guest import write_tiny_kernel

pytestmark = pytest.mark.qemu
StartDriver = Callable[..., Awaitable[AsyncQemu]]
PAUSED = ("-S",)


def descriptors(pid: str) -> list[str]:
    directory = f"/proc/{pid}/fd"
    targets = []
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(f"{directory}/{name}"))
    return targets


def listener_inode(path_end: str) -> str:
    # Field 4 has the flag of a listener, field 7 is the inode.
    lines = Path("/proc/net/unix").read_text().splitlines()
    return next(
        line.split()[6] for line in lines if line.endswith(path_end) and line.split()[3] == "00010000"
    )


async def wait_for_console(driver: AsyncQemu, text: bytes) -> None:
    async with asyncio.timeout(20):
        # The tail has no event of its own: the guest's first output is what is waited for.
        while text not in driver.process.console_tail():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("machine", ["q35", "microvm"])
async def test_start_when_guest_writes_to_its_serial_port_then_the_console_is_kept(
    start_driver: StartDriver, machine: str, disk: BlockDevice
) -> None:
    driver = await start_driver(machine=machine, disks=(disk,))

    await wait_for_console(driver, b"tiny guest")

    assert (await (await driver.qmp()).execute("query-status", timeout_s=5))["status"] == "running"


@pytest.mark.parametrize("machine", ["q35", "microvm"])
async def test_start_when_plan_names_devices_then_qemu_has_them_where_the_plan_says(
    start_driver: StartDriver, machine: str, disk: BlockDevice
) -> None:
    driver = await start_driver(machine=machine, disks=(disk,), qemu_arguments=PAUSED)
    client = await driver.qmp()

    (block,) = await client.execute("query-block", timeout_s=5)
    buses = await client.execute("query-pci", timeout_s=5)

    assert block["inserted"]["ro"] is True
    assert block["inserted"]["file"].endswith("disk,one.img")
    slots = {device["qdev_id"]: device["slot"] for bus in buses for device in bus["devices"]}
    assert slots.get("virtio-c1") == (3 if machine == "q35" else None)
    assert [slots.get(f"rp{i}") for i in range(4)] == ([15, 16, 17, 18] if machine == "q35" else [None] * 4)


async def test_start_when_all_devices_of_the_reference_set_are_asked_for_then_qemu_takes_them(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(
        disks=(disk,),
        hotplug_ports=16,
        vcpus=2,
        max_vcpus=4,
        max_memory_mib=256,
        debug=True,
        qemu_arguments=PAUSED,
    )
    client = await driver.qmp()

    cpus = await client.execute("query-hotpluggable-cpus", timeout_s=5)
    name, uuid, memory = await client.execute_many(
        [("query-name", None), ("query-uuid", None), ("query-memory-size-summary", None)], timeout_s=5
    )

    assert sum("qom-path" in cpu for cpu in cpus) == 2
    assert len(cpus) == 4
    assert name == {"name": "sandbox-t1"}
    assert uuid == {"UUID": driver.uuid}
    assert memory["base-memory"] == 64 << 20


async def test_rejected_option_when_qemu_starts_then_fails_with_its_stderr_within_a_second(
    start_driver: StartDriver,
) -> None:
    started = time.monotonic()
    driver = await start_driver(qemu_arguments=("-device", "bogus-device"))

    with pytest.raises(VmmExitedError, match="QEMU rejected an option") as caught:
        await driver.qmp()

    assert time.monotonic() - started < 1.0
    assert caught.value.status == 1
    assert "'bogus-device' is not a valid device model name" in caught.value.log_tail
    assert caught.value.sandbox_id == "t1"


async def test_kernel_when_it_is_no_kernel_then_the_cause_names_it(
    start_driver: StartDriver, assets: GuestAssets, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no kernel" * 200)
    driver = await start_driver(guest=GuestAssets(kernel=str(tmp_path / "text"), initrd=assets.initrd))

    error = await driver.exit_error(5.0)

    assert error is not None
    assert "QEMU could not load the kernel" in str(error)


async def test_kill_when_a_command_waits_then_it_fails_within_100_ms(start_driver: StartDriver) -> None:
    driver = await start_driver(qemu_arguments=PAUSED)
    client = await driver.qmp()
    waits = [asyncio.create_task(client.wait_event("STOP", timeout_s=30)) for _ in range(3)]
    await asyncio.sleep(0)

    os.kill(driver.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    results = await asyncio.gather(*waits, return_exceptions=True)

    assert time.monotonic() - killed < 0.1
    assert [(type(result), getattr(result, "status", None)) for result in results] == [
        (VmmExitedError, -9)
    ] * 3
    assert "killed by SIGKILL" in str(results[0])
    with pytest.raises(VmmExitedError):
        await client.execute("query-status", timeout_s=5)


async def test_panic_when_guest_ends_after_one_then_its_text_is_in_the_error(
    start_driver: StartDriver, assets: GuestAssets, tmp_path: Path
) -> None:
    text = "[    0.5] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\r\n"
    kernel = write_tiny_kernel(tmp_path / "panics", text, reset=True)
    driver = await start_driver(guest=GuestAssets(kernel=str(kernel), initrd=assets.initrd))

    error = await driver.exit_error(10.0)

    assert error is not None
    assert "the guest kernel panicked: Attempted to kill init!" in str(error)
    assert "exitcode=0x00000100" in error.console_tail
    assert error.status == 0


async def test_exit_error_when_qemu_runs_then_is_none(start_driver: StartDriver) -> None:
    driver = await start_driver(qemu_arguments=PAUSED)
    await driver.qmp()

    assert await driver.exit_error(0.01) is None


async def test_stop_when_called_twice_then_qemu_quits_once_and_nothing_is_left(
    start_driver: StartDriver, state_root: Path
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED)
    process = driver.process

    await asyncio.gather(driver.stop(), driver.stop())

    assert process.exit_status() == 0
    assert os.listdir(state_root / "vm1") == []
    with pytest.raises(InvalidStateError):
        await driver.qmp()


async def test_stop_when_qemu_does_not_answer_then_it_is_killed_at_the_deadline(
    start_driver: StartDriver,
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, timeouts=TimeoutConfig(stop_s=0.2))
    await driver.qmp()
    process = driver.process
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()

    await driver.stop()

    assert process.exit_status() == -9
    assert 0.2 <= time.monotonic() - started < 2.0


async def test_stop_when_only_prepared_then_sockets_and_descriptors_go(
    tmp_path: Path, state_root: Path, settings: Settings, assets: GuestAssets
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    driver = await AsyncQemu.create(SandboxConfig(accel="tcg"), settings, sandbox_id="t1")
    driver.plan(assets)
    transport = await driver.prepare(state_root)
    assert isinstance(transport, HybridTransport)
    assert sorted(os.listdir(state_root)) == ["qmp.sock", "vsock.sock"]

    await driver.stop()

    assert os.listdir(state_root) == []
    assert set(os.listdir("/proc/self/fd")) == before


async def test_prepare_when_the_directory_is_missing_then_raises_and_leaves_nothing(
    state_root: Path, settings: Settings, assets: GuestAssets
) -> None:
    driver = await AsyncQemu.create(SandboxConfig(accel="tcg"), settings, sandbox_id="t1")
    driver.plan(assets)

    with pytest.raises(HostError, match=r"qmp\.sock"):
        await driver.prepare(state_root / "none")
    await driver.stop()


async def test_steps_when_out_of_order_then_are_refused(
    state_root: Path, settings: Settings, assets: GuestAssets
) -> None:
    driver = await AsyncQemu.create(SandboxConfig(accel="tcg"), settings, sandbox_id="t1")

    with pytest.raises(InvalidStateError):
        await driver.prepare(state_root)
    with pytest.raises(InvalidStateError):
        await driver.start()
    with pytest.raises(InvalidStateError):
        await driver.qmp()
    await driver.stop()


async def test_create_when_the_host_lacks_something_then_raises_before_anything_is_made(
    state_root: Path, settings: Settings
) -> None:
    with pytest.raises(NotFoundError, match="qemu-system-x86"):
        await AsyncQemu.create(SandboxConfig(qemu_path="/nowhere/qemu"), settings, sandbox_id="t1")
    with pytest.raises(InvalidConfigError, match="the host has"):
        await AsyncQemu.create(SandboxConfig(memory_mib=1 << 24), settings, sandbox_id="t1")
    assert os.listdir(state_root) == []


async def test_create_when_qemu_is_too_old_then_says_so(tmp_path: Path, settings: Settings) -> None:
    old = tmp_path / "qemu-old"
    old.write_text("#!/bin/sh\necho QEMU emulator version 4.2.0\n")
    old.chmod(0o755)

    with pytest.raises(UnsupportedError, match=r"4\.2\.0"):
        await AsyncQemu.create(SandboxConfig(qemu_path=str(old)), settings, sandbox_id="t1")


async def test_pause_when_resumed_then_the_vcpus_stand_and_go(start_driver: StartDriver) -> None:
    driver = await start_driver()
    client = await driver.qmp()

    await driver.pause()
    paused = await client.execute("query-status", timeout_s=5)
    await driver.resume()
    resumed = await client.execute("query-status", timeout_s=5)

    assert (paused["status"], resumed["status"]) == ("paused", "running")


async def test_attach_block_when_ports_are_free_then_each_disk_gets_one_and_qemu_has_it(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, hotplug_ports=1)

    address = await driver.attach_block(disk)

    assert (address.id, address.pci_path) == ("c1", "0f/00")
    (block,) = await (await driver.qmp()).execute("query-block", timeout_s=5)
    assert block["inserted"]["node-name"] == "drive-c1"
    with pytest.raises(AlreadyExistsError):
        await driver.attach_block(disk)
    with pytest.raises(ResourceExhaustedError, match="all 1 places"):
        await driver.attach_block(BlockDevice(id="c2", path=disk.path, serial="c2"))


async def test_attach_block_when_file_is_missing_then_qemus_error_is_told_and_the_port_stays_free(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, hotplug_ports=1)

    with pytest.raises(QmpError, match="No such file") as caught:
        await driver.attach_block(BlockDevice(id="c2", path="/nowhere", serial="c2"))

    assert caught.value.command == "blockdev-add"
    assert (await driver.attach_block(disk)).pci_path == "0f/00"


async def test_attach_block_when_the_device_is_refused_then_the_node_is_taken_back(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, hotplug_ports=1)
    client = await driver.qmp()
    await client.execute(
        "device_add", {"driver": "virtio-rng-pci", "id": "virtio-c1", "bus": "rp0"}, timeout_s=5
    )

    with pytest.raises(QmpError) as caught:
        await driver.attach_block(disk)

    assert caught.value.command == "device_add"
    assert await client.execute("query-named-block-nodes", {"flat": True}, timeout_s=5) == []


async def test_attach_block_when_the_disk_has_options_then_qemu_has_them(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, hotplug_ports=1)

    await driver.attach_block(structs.replace(disk, direct=True, discard=True, read_only=False))

    client = await driver.qmp()
    (block,) = await client.execute("query-block", timeout_s=5)
    nodes = await client.execute("query-named-block-nodes", timeout_s=5)
    assert (block["inserted"]["ro"], block["inserted"]["cache"]["direct"]) == (False, True)
    assert [node["cache"]["direct"] for node in nodes] == [True, True]


@pytest.fixture
def loop_device(disk: BlockDevice) -> Iterator[str]:
    made = ["losetup", "--find", "--show", disk.path]
    path = subprocess.run(made, capture_output=True, text=True, check=True).stdout.strip()
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


@pytest.mark.root
async def test_attach_block_when_it_is_a_block_device_then_qemu_opens_it_as_one(
    loop_device: str, start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, hotplug_ports=1)

    await driver.attach_block(structs.replace(disk, path=loop_device, host_device=True))

    client = await driver.qmp()
    (block,) = await client.execute("query-block", timeout_s=5)
    nodes = await client.execute("query-named-block-nodes", timeout_s=5)
    assert block["inserted"]["file"] == loop_device
    assert {node["drv"] for node in nodes} == {"raw", "host_device"}


async def test_attach_block_when_machine_has_no_ports_then_is_unsupported(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(machine="microvm", qemu_arguments=PAUSED)

    with pytest.raises(UnsupportedError, match="use machine 'q35'"):
        await driver.attach_block(disk)


async def test_detach_block_when_the_guest_lets_go_then_port_and_node_are_free(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, hotplug_ports=1)
    client = await driver.qmp()
    await client.execute("set-action", {"reboot": "reset"}, timeout_s=5)
    await driver.attach_block(disk)
    removal = asyncio.create_task(driver.detach_block("c1"))
    await asyncio.sleep(0.05)
    assert not removal.done()

    # A reset of the machine finishes what the guest was asked for.
    await client.execute("system_reset", timeout_s=5)
    await removal

    assert await client.execute("query-named-block-nodes", {"flat": True}, timeout_s=5) == []
    assert (await driver.attach_block(disk)).pci_path == "0f/00"


async def test_detach_block_when_the_guest_never_answers_then_ends_at_the_deadline_and_other_commands_go_on(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED, hotplug_ports=1, timeouts=TimeoutConfig(hotplug_s=0.3))
    await driver.attach_block(disk)
    removal = asyncio.create_task(driver.detach_block("c1"))
    await asyncio.sleep(0.05)

    status = await (await driver.qmp()).execute("query-status", timeout_s=1)

    assert status["status"] in ("prelaunch", "paused")
    assert not removal.done()
    with pytest.raises(DeadlineExceededError, match="DEVICE_DELETED"):
        await removal
    # The wish still stands: asking again waits again, and is no error of its own.
    with pytest.raises(DeadlineExceededError):
        await driver.detach_block("c1")
    with pytest.raises(ResourceExhaustedError):
        await driver.attach_block(BlockDevice(id="c2", path=disk.path, serial="c2"))


async def test_detach_block_when_no_such_disk_then_names_those_there_are(
    start_driver: StartDriver, disk: BlockDevice
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED)
    await driver.attach_block(disk)

    with pytest.raises(NotFoundError, match="there are: c1"):
        await driver.detach_block("c2")


async def test_listener_when_qemu_runs_then_only_qemu_holds_it(
    start_driver: StartDriver, state_root: Path
) -> None:
    driver = await start_driver(qemu_arguments=PAUSED)
    await driver.qmp()
    inode = listener_inode("vm1/qmp.sock")

    assert f"socket:[{inode}]" in descriptors(str(driver.process.pid))
    assert f"socket:[{inode}]" not in descriptors("self")


async def test_fds_when_qemu_runs_then_it_has_none_of_ours_but_those_handed_over(
    start_driver: StartDriver,
) -> None:
    ours, theirs = socket.socketpair()
    os.set_inheritable(ours.fileno(), True)
    with ours, theirs:
        driver = await start_driver(qemu_arguments=PAUSED)
        await driver.qmp()
        inode = os.fstat(ours.fileno()).st_ino

        held = descriptors(str(driver.process.pid))

    assert f"socket:[{inode}]" not in held
