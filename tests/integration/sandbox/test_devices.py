"""Devices of a sandbox on the fake VMM: names, places and what is written, also by many at once and after faults."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from pathlib import Path

import pytest

from casemate import (
    AgentRpcError,
    AsyncSandbox,
    BlockAttachment,
    QmpError,
    Sandbox,
    TimeoutConfig,
    VmmExitedError,
)
from casemate.observe import failpoints
from casemate.persist.store import load_record
from tests.support.fake_vm import FakeVm

pytestmark = pytest.mark.root

THREADS = 8


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def test_attach_when_the_guest_tells_its_names_then_they_and_the_places_are_written(
    fake_vm: FakeVm, image: Path
) -> None:
    with Sandbox.create(fake_vm.config("disks", hotplug_ports=3), settings=fake_vm.settings) as sandbox:
        first, second = (sandbox.attach_block(image, readonly=True) for _ in range(2))

        assert first == BlockAttachment(
            id="disk0", path=str(image), readonly=True, pci_path="0f/00", device="/dev/vda"
        )
        assert (second.id, second.pci_path, second.device) == ("disk1", "10/00", "/dev/vdb")
        record = load_record(fake_vm.settings, "disks")
        assert record.devices == sandbox.attachments == (first, second)
        assert {name: place.path for name, place in record.topology.places().items()} == {
            "disk0": "0f/00",
            "disk1": "10/00",
        }
        sandbox.detach(first)
        third = sandbox.attach_block(image, readonly=True)
        assert (third.id, third.pci_path) == ("disk0", "0f/00")
        assert load_record(fake_vm.settings, "disks").devices == (second, third)


def test_attach_when_the_place_is_taken_then_the_document_knows_it_before_the_vmm_does(
    fake_vm: FakeVm, image: Path
) -> None:
    seen = []
    with Sandbox.create(fake_vm.config("early"), settings=fake_vm.settings) as sandbox:
        with failpoints.calling(
            "qemu.blockdev_add", lambda: seen.append(load_record(fake_vm.settings, "early").topology.places())
        ):
            sandbox.attach_block(image)
        assert [set(places) for places in seen] == [{"disk0"}]


def test_attach_when_8_threads_do_it_at_once_then_each_has_a_place_of_its_own(
    fake_vm: FakeVm, image: Path
) -> None:
    config = fake_vm.config("threads", hotplug_ports=THREADS)
    with (
        Sandbox.create(config, settings=fake_vm.settings) as sandbox,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        barrier = threading.Barrier(THREADS)

        def use(_: int) -> BlockAttachment:
            barrier.wait(10)
            sandbox.detach(sandbox.attach_block(image, readonly=True))
            return sandbox.attach_block(image, readonly=True)

        kept = list(pool.map(use, range(THREADS)))

        assert len({one.id for one in kept}) == len({one.pci_path for one in kept}) == THREADS
        assert set(load_record(fake_vm.settings, "threads").devices) == set(kept)
        list(pool.map(sandbox.detach, kept))
        assert load_record(fake_vm.settings, "threads").topology.free_count == THREADS


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ({"blockdev-add": "refuse"}, QmpError),
        ({"device_add": "refuse"}, QmpError),
        ({"AwaitDevice": "refuse"}, AgentRpcError),
        ({"device_add": "die"}, VmmExitedError),
        ({"AwaitDevice": "die"}, VmmExitedError),
    ],
)
async def test_attach_when_vmm_or_agent_fails_then_told_and_the_place_is_free(
    fake_vm: FakeVm, image: Path, faults: dict[str, str], error: type[Exception]
) -> None:
    config = fake_vm.config(
        "faults", hotplug_ports=1, script={"faults": faults}, timeouts=TimeoutConfig(stop_s=2.0)
    )
    async with await AsyncSandbox.create(config, settings=fake_vm.settings) as sandbox:
        with pytest.raises(error):
            await sandbox.attach_block(image)

        assert sandbox.attachments == ()
        assert load_record(fake_vm.settings, "faults").topology.free_count == 1


async def test_attach_when_cancelled_while_the_vmm_is_silent_then_undone_first(
    fake_vm: FakeVm, image: Path
) -> None:
    timeouts = TimeoutConfig(control_s=0.5, hotplug_s=0.5, stop_s=0.5)
    config = fake_vm.config("silent", script={"faults": {"device_add": "silence"}}, timeouts=timeouts)
    async with await AsyncSandbox.create(config, settings=fake_vm.settings) as sandbox:
        reached = asyncio.Event()
        with failpoints.calling("qemu.device_add", reached.set):
            task = asyncio.create_task(sandbox.attach_block(image))
            await reached.wait()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        assert fake_vm.asked()[-3:] == ["device_add", "device_del", "blockdev-del"]
        assert load_record(fake_vm.settings, "silent").topology.places() == {}


def test_attach_when_the_sandbox_is_stopped_meanwhile_then_told_and_nothing_stays(
    fake_vm: FakeVm, image: Path
) -> None:
    config = fake_vm.config("stopped", script={"faults": {"device_add": "silence"}})
    sandbox = Sandbox.create(config, settings=fake_vm.settings)
    reached = threading.Event()
    with (
        failpoints.calling("qemu.device_add", reached.set),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        attaching = pool.submit(sandbox.attach_block, image)
        assert reached.wait(10)
        sandbox.stop()

        assert isinstance(attaching.exception(10), VmmExitedError)
    assert sandbox.attachments == ()
    assert not list((fake_vm.settings.state_root / "sandboxes").iterdir())


async def test_attach_when_another_waits_for_its_turn_and_is_cancelled_then_the_first_is_not_disturbed(
    fake_vm: FakeVm, image: Path
) -> None:
    async with await AsyncSandbox.create(fake_vm.config("turns"), settings=fake_vm.settings) as sandbox:
        first = asyncio.create_task(sandbox.attach_block(image, readonly=True))
        second = asyncio.create_task(sandbox.attach_block(image, readonly=True))
        await asyncio.sleep(0)
        second.cancel()

        disk = await first

        with pytest.raises(asyncio.CancelledError):
            await second
        assert sandbox.attachments == (disk,)
        assert set(sandbox.inspect().topology.places()) == {"disk0"}


def test_attach_when_the_driver_does_not_ask_the_guest_then_the_attachment_has_no_name_there(
    fake_vm: FakeVm, image: Path
) -> None:
    config = fake_vm.config("mock", hypervisor="mock")
    with Sandbox.create(config, settings=fake_vm.settings) as sandbox:
        disk, nic = sandbox.attach_block(image), sandbox.attach_nic()

        assert (disk.device, nic.interface, nic.pci_path) == (None, None, "10/00")
        assert int(nic.mac[:2], 16) & 3 == 2
        assert sandbox.inspect().devices == (disk, nic)
        sandbox.detach(nic)
        sandbox.detach("disk0")
        assert sandbox.attachments == ()
