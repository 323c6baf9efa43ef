"""Disks and network interfaces that come and go on a live guest: QEMU, the guest, the host and the state document agree."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casemate import (
    AgentConnectionError,
    AsyncSandbox,
    BlockAttachment,
    ContainerConfig,
    NicAttachment,
    Sandbox,
    SandboxConfig,
    Settings,
    VmmExitedError,
)
from casemate._async.hypervisor.qemu import AsyncQemu
from casemate.observe import failpoints
from casemate.persist.store import load_record
from tests.support import guest_devices as views
from tests.support.netns import links, network_namespace

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.tun, pytest.mark.busybox]

DISKS = 10
NICS = 5
STEPS = 100
ATTACH_BLOCK = tuple(
    f"{step}{behind}"
    for step in ("qemu.blockdev_add", "qemu.device_add", "guest.there")
    for behind in ("", ".after")
)
ATTACH_NIC = tuple(
    f"{step}{behind}"
    for step in (
        "tap.create",
        "qemu.getfd",
        "qemu.netdev_add",
        "tap.hand_over",
        "qemu.device_add",
        "guest.there",
    )
    for behind in ("", ".after")
)
DETACH = ("qemu.device_del", "qemu.device_del.after", "guest.gone", "guest.gone.after")


@pytest.fixture(autouse=True)
def _no_log_records(caplog: pytest.LogCaptureFixture) -> None:
    """A kept record holds its error, that holds its frames, and those hold what was made."""
    caplog.set_level(logging.CRITICAL, logger="casemate")


@pytest.fixture
def namespace() -> Iterator[str]:
    with network_namespace() as path:
        yield path


def make_images(directory: Path, count: int) -> list[Path]:
    paths = [directory / f"disk{number}.img" for number in range(count)]
    for number, path in enumerate(paths):
        with path.open("wb") as file:
            file.truncate((number + 1) << 20)
    return paths


def looping(image: str) -> ContainerConfig:
    return ContainerConfig(name="main", image=image, command=("cat",))


async def look(sandbox: AsyncSandbox, settings: Settings, namespace: str) -> None:
    """All four views agree with what the sandbox says is attached."""
    attached: list[Any] = list(sandbox.attachments)
    driver = sandbox._own_driver("test")
    assert isinstance(driver, AsyncQemu)
    client = await driver.qmp()
    answers = await client.execute_many(views.qemu_queries(), timeout_s=30)
    assert views.qemu_view(answers) == views.expected_qemu(attached, {"drive-rootfs0"})

    listing = await sandbox.container().exec(["sh", "-c", views.LIST_DEVICES], capture=True)
    assert views.guest_view(listing.stdout, {"rootfs0"}) == views.expected_guest(attached)

    taps = {one.tap for one in attached if isinstance(one, NicAttachment)}
    assert views.host_view(namespace) == set(links(namespace)) == taps

    record = load_record(settings, sandbox.id)
    assert record == sandbox.inspect()
    assert record.devices == sandbox.attachments
    assert {name: place.path for name, place in record.topology.places().items()} == {
        one.id: one.pci_path for one in attached
    }


@pytest.mark.timeout(1200)
async def test_attach_and_detach_when_in_random_order_then_qemu_guest_host_and_state_agree_after_each_step(
    busybox: str, settings: Settings, namespace: str, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CASEMATE_TEST_SEED", str(random.randrange(2**32))))
    print(f"seed {seed}")
    choose = random.Random(seed)
    images = make_images(tmp_path, DISKS)
    config = SandboxConfig(hotplug_ports=16)
    attached: dict[object, Any] = {}
    took_ms: dict[str, list[float]] = {"attach": [], "detach": []}

    async with await AsyncSandbox.create(
        config, containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        attach: dict[object, Any] = {
            path: lambda path=path, number=number: sandbox.attach_block(path, readonly=bool(number % 2))
            for number, path in enumerate(images)
        } | {
            f"02:00:00:00:00:{number:02x}": lambda number=number: sandbox.attach_nic(
                mac=f"02:00:00:00:00:{number:02x}", netns=namespace
            )
            for number in range(NICS)
        }
        await look(sandbox, settings, namespace)
        for _ in range(STEPS):
            key = choose.choice(list(attach))
            started = time.monotonic()
            gone = attached.pop(key, None)
            if gone is not None:
                await sandbox.detach(gone)
            else:
                attached[key] = await attach[key]()
            took_ms["detach" if gone else "attach"].append((time.monotonic() - started) * 1000)
            assert set(sandbox.attachments) == set(attached.values())
            await look(sandbox, settings, namespace)
    for name, figures in took_ms.items():
        ordered = sorted(figures)
        p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        print(f"{name}: {len(ordered)}, p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    assert links(namespace) == {}


def is_interrupted(task: asyncio.Task[Any], point: str) -> bool:
    return task.cancelled() or type(task.exception()) is failpoints.POINTS[point]


@pytest.mark.timeout(900)
async def test_attach_and_detach_when_any_step_fails_then_all_is_as_it_was(
    busybox: str, settings: Settings, namespace: str, tmp_path: Path
) -> None:
    (image,) = make_images(tmp_path, 1)
    steps = 0
    async with await AsyncSandbox.create(
        SandboxConfig(hotplug_ports=1), containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:

        async def fail(point: str, action: str, work: Any) -> None:
            nonlocal steps
            with failpoints.armed(f"{point}=1*{action}") as hits:
                task = asyncio.create_task(work)
                await asyncio.wait([task])
                assert hits(point) == 1, point
                assert is_interrupted(task, point), (point, task)
            steps += 1
            await look(sandbox, settings, namespace)

        def attach_block() -> Any:
            return sandbox.attach_block(image)

        def attach_nic() -> Any:
            return sandbox.attach_nic(netns=namespace)

        for attach, points, last in (
            (attach_block, ATTACH_BLOCK, "qemu.blockdev_del"),
            (attach_nic, ATTACH_NIC, "qemu.netdev_del"),
        ):
            # One port: each success shows that every failure gave it back.
            for action in ("error(made to fail)", "cancel"):
                for point in points:
                    await fail(point, action, attach())
                    assert sandbox.attachments == ()
            attachment = await attach()
            for action in ("error(made to fail)", "cancel"):
                for point in (*DETACH, last):
                    await fail(point, action, sandbox.detach(attachment))
                    assert [one.id for one in sandbox.attachments] == [attachment.id]
            await sandbox.detach(attachment)
            await look(sandbox, settings, namespace)
    print(f"failpoints: {steps} steps of error and cancellation")


def test_attach_when_the_document_cannot_be_written_then_the_device_is_not_kept(
    busybox: str, settings: Settings, namespace: str
) -> None:
    with Sandbox.create(settings=settings) as sandbox:
        # Before it is made, and when it is there.
        for skipped in ("", "1*off->"):
            with (
                failpoints.armed(f"store.write={skipped}1*error(disk full)"),
                pytest.raises(failpoints.POINTS["store.write"], match="disk full"),
            ):
                sandbox.attach_nic(netns=namespace)
            assert sandbox.attachments == ()
            assert links(namespace) == {}
        nic = sandbox.attach_nic(netns=namespace)
        assert (nic.tap, nic.interface, list(links(namespace))) == ("cm0", "eth0", ["cm0"])


@pytest.mark.parametrize("point", ["qemu.device_add.after", "guest.there", "qemu.device_del.after"])
def test_nic_when_the_vmm_dies_in_between_then_told_at_once_and_the_tap_is_gone(
    settings: Settings, namespace: str, point: str
) -> None:
    with Sandbox.create(settings=settings) as sandbox:

        def kill() -> None:
            os.kill(sandbox.vmm_pid, signal.SIGKILL)

        with failpoints.calling(point, kill), pytest.raises(VmmExitedError) as caught:
            sandbox.detach(sandbox.attach_nic(netns=namespace))

        assert caught.value.status == -signal.SIGKILL
    assert links(namespace) == {}


OWNER = """
import sys
from casemate import Sandbox, SandboxConfig
with Sandbox.create(SandboxConfig(name="killed")) as sandbox:
    sandbox.detach(sandbox.attach_nic(netns=sys.argv[1]))
"""


@pytest.mark.parametrize(
    "point", ["tap.create.after", "qemu.getfd.after", "tap.hand_over.after", "qemu.device_del.after"]
)
def test_owner_when_killed_in_between_then_no_tap_stays_and_the_name_is_freed(
    settings: Settings, namespace: str, point: str
) -> None:
    environment = os.environ | {"CASEMATE_FAILPOINTS": f"{point}=kill"}

    owner = subprocess.run([sys.executable, "-c", OWNER, namespace], env=environment)

    assert owner.returncode == -signal.SIGKILL
    assert load_record(settings, "killed").topology.places().keys() == {"nic0"}
    assert Sandbox.cleanup("killed", settings=settings).removed
    assert links(namespace) == {}


OTHER = """
import sys
from casemate import Sandbox
with Sandbox.attach("kept") as sandbox:
    print(*(one.id for one in sandbox.attachments))
    sandbox.detach("disk0")
    print(sandbox.attach_block(sys.argv[1], readonly=True).pci_path)
    print(sandbox.attach_block(sys.argv[1], readonly=True).pci_path)
"""


def test_detached_when_another_process_goes_on_then_it_has_the_same_map(
    busybox: str, settings: Settings, namespace: str, tmp_path: Path
) -> None:
    (image,) = make_images(tmp_path, 1)
    config = SandboxConfig(name="kept")
    with Sandbox.create(
        config, containers=(looping(busybox),), start=True, detached=True, settings=settings
    ) as maker:
        try:
            disk, nic = maker.attach_block(image), maker.attach_nic(netns=namespace)
            assert (disk.pci_path, disk.device) == ("0f/00", "/dev/vdb")
            assert (nic.pci_path, nic.interface) == ("10/00", "eth0")

            other = subprocess.run(
                [sys.executable, "-c", OTHER, str(image)], capture_output=True, text=True, check=True
            )

            assert other.stdout.splitlines() == ["disk0 nic0", "0f/00", "11/00"]
            with Sandbox.attach("kept", settings=settings) as sandbox:
                attached = list(sandbox.attachments)
                assert [one.id for one in attached] == ["nic0", "disk0", "disk1"]
                listing = sandbox.container().exec(["sh", "-c", views.LIST_DEVICES], capture=True)
                assert views.guest_view(listing.stdout, {"rootfs0"}) == views.expected_guest(attached)
                with (
                    failpoints.armed("guest.gone=1*error(made to fail)"),
                    pytest.raises(AgentConnectionError),
                ):
                    sandbox.detach(nic)
                assert "nic0" in {one.id for one in load_record(settings, "kept").devices}
                for one in attached:
                    sandbox.detach(one)
                assert load_record(settings, "kept").topology.free_count == 4
            assert links(namespace) == {}
        finally:
            maker.stop()


def test_attach_when_the_guest_is_busy_then_it_is_waited_for(
    busybox: str, settings: Settings, namespace: str, tmp_path: Path
) -> None:
    (image,) = make_images(tmp_path, 1)
    with Sandbox.create(containers=(looping(busybox),), start=True, settings=settings) as sandbox:
        busy = [sandbox.container().exec(["sh", "-c", "while :; do :; done"]) for _ in range(4)]
        for _ in range(3):
            disk, nic = sandbox.attach_block(image), sandbox.attach_nic(netns=namespace)
            assert isinstance(disk, BlockAttachment)
            assert isinstance(nic, NicAttachment)
            assert (disk.device, nic.interface) == ("/dev/vdb", "eth0")
            sandbox.detach(nic)
            sandbox.detach(disk)
        for process in busy:
            process.signal(signal.SIGKILL)
        assert links(namespace) == {}
