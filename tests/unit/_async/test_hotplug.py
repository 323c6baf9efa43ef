"""Devices that come and go, on a fake QEMU: every step fails in turn, and what is left is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest

from casemate._async.hypervisor.qemu_hotplug import AsyncHotplug
from casemate._async.qmp import AsyncQmpClient
from casemate.agent.messages import AwaitDeviceResponse
from casemate.config.sandbox import TimeoutConfig
from casemate.errors import (
    AgentConnectionError,
    AlreadyExistsError,
    DeadlineExceededError,
    HostError,
    HypervisorError,
    InvalidConfigError,
    NotFoundError,
    QmpError,
    ResourceExhaustedError,
    UnsupportedError,
    VmmExitedError,
)
from casemate.hypervisor import BlockDevice, NicDevice, PluggedDevice
from casemate.hypervisor.attachments import attachment_of, plugged_of
from casemate.hypervisor.pci import Bridge, BridgeKind, Topology
from casemate.hypervisor.qemu.hotplug import plan_attach, plan_detach
from casemate.observe import failpoints
from casemate.transaction import GuestCall
from casemate.types import Attachment
from tests.support.fake_devices import FakeDevices
from tests.support.fake_qmp import SILENCE, FakeQmp, Refusal

Device = BlockDevice | NicDevice
DISK = BlockDevice(id="disk0", path="/d", serial="disk0")
NIC = NicDevice(id="nic0", mac="02:00:00:00:00:01")
DEVICES = pytest.mark.parametrize("device", [DISK, NIC], ids=["disk", "nic"])
ONE_PORT = Topology(bridges=(Bridge(id="rp0", kind=BridgeKind.ROOT_PORT, address="0f"),))
FAST = TimeoutConfig(control_s=5, hotplug_s=5)


class Taps:
    """Tap devices that are only counted."""

    def __init__(self) -> None:
        self.open = 0

    def natives(self) -> dict[str, Any]:
        return {"tap.create": self._create, "tap.close": lambda tap: tap and tap.close()}

    def _create(self, _: object, *, name: str, netns: str | None, owner: int | None) -> FakeTap:
        self.open += 1
        return FakeTap(self, name.replace("%d", "0"))


class FakeTap:
    """A descriptor that can be sent."""

    def __init__(self, taps: Taps, name: str) -> None:
        self.name = name
        self._taps = taps
        self._file = socket.socket()
        self.fd = self._file.fileno()

    def close(self) -> None:
        self._taps.open -= self.fd >= 0
        self.fd = -1
        self._file.close()


class Guest:
    """Answers what the fake QEMU has, or fails."""

    def __init__(self, qemu: FakeQmp, devices: FakeDevices) -> None:
        self.qemu = qemu
        self.asked: list[Mapping[str, Any]] = []
        self.error: BaseException | None = None
        self.name = "vdb"
        self._devices = devices

    async def ask(self, call: GuestCall, results: Mapping[str, Any], limit_s: float) -> AwaitDeviceResponse:
        self.asked.append(call.arguments)
        await asyncio.sleep(0)
        if self.qemu.closed:
            raise VmmExitedError("QEMU is gone", status=-9)
        if self.error is not None:
            raise self.error
        assert bool(self._devices.devices) is not call.arguments["gone"]
        return AwaitDeviceResponse(name=self.name)


class Rig:
    """An engine on a fake QEMU."""

    def __init__(
        self, qemu: FakeQmp, client: AsyncQmpClient, topology: Topology, timeouts: TimeoutConfig
    ) -> None:
        self.qemu = qemu
        self.client = client
        self.devices = FakeDevices(qemu)
        self.guest = Guest(qemu, self.devices)
        self.taps = Taps()
        self.written: list[Topology] = []
        self.engine = AsyncHotplug(topology, "q35", timeouts, self._write, self.taps.natives())

    async def _write(self) -> None:
        self.written.append(self.engine.topology)

    async def attach(self, device: Device) -> Any:
        return await self.engine.attach(self.client, device, self.guest.ask)

    async def detach(self, device: Device) -> None:
        await self.engine.detach(self.client, device.id, self.guest.ask)

    def is_clean(self) -> bool:
        """Nothing is left of any device, here, in QEMU and in what was written."""
        nothing: tuple[set[str], int, tuple[()]] = (set(), 0, ())
        return (self.devices.everything(), self.taps.open, self.engine.plugged) == nothing and (
            self.engine.topology == ONE_PORT and self.written[-1] == ONE_PORT
        )


async def died(error: HypervisorError) -> Exception:
    return VmmExitedError("QEMU is gone", status=-9)


async def no_one() -> None:
    """Nobody wants to know of a change."""


@contextlib.asynccontextmanager
async def rig(topology: Topology = ONE_PORT, timeouts: TimeoutConfig = FAST) -> AsyncIterator[Rig]:
    ours, theirs = socket.socketpair()
    with FakeQmp(theirs) as qemu:
        client = AsyncQmpClient(ours, explain=died)
        await client.negotiate(timeout_s=5)
        yield Rig(qemu, client, topology, timeouts)
        client.close()


def points(device: Device, *, detach: bool = False) -> list[str]:
    """The failpoints of a plan, in order."""
    _, place = ONE_PORT.allocate(device.id)
    steps = (plan_detach if detach else plan_attach)(device, place, FAST, check=True).steps
    names = [name for step in steps for name in (step.name, f"{step.name}.after")]
    return names[:-1] if detach else names


@DEVICES
async def test_attach_when_all_goes_well_then_the_guest_was_asked_and_the_place_written_first(
    device: Device,
) -> None:
    async with rig() as made:
        plugged = await made.attach(device)

        assert (plugged.pci_path, plugged.guest_name) == ("0f/00", "vdb")
        assert [(asked["pci_path"], asked["gone"]) for asked in made.guest.asked] == [("0f/00", False)]
        (name,) = made.devices.devices
        assert made.devices.devices[name]["bus"] == "rp0"
        assert made.engine.plugged == (plugged,)
        assert made.written == [ONE_PORT.allocate(device.id)[0]]
        assert made.taps.open == 0
        await made.detach(device)
        assert made.is_clean()


async def test_attach_when_a_nic_then_its_descriptor_goes_to_qemu_and_no_rom_is_loaded() -> None:
    async with rig() as made:
        plugged = await made.attach(NIC)

        added = made.devices.devices["virtio-nic0"]
        assert (added["driver"], added["netdev"], added["mac"], added["romfile"]) == (
            "virtio-net-pci",
            "net-nic0",
            NIC.mac,
            "",
        )
        assert plugged.host_name == "cm0"
        assert made.devices.fds == set()


@DEVICES
@pytest.mark.parametrize("action", ["error", "cancel"])
async def test_attach_when_any_step_fails_then_all_is_undone_and_the_port_free(
    device: Device, action: str
) -> None:
    async with rig() as made:
        for point in points(device):
            with failpoints.armed(f"{point}=1*{action}") as hits:
                task = asyncio.create_task(made.attach(device))
                await asyncio.wait([task])
                assert hits(point) == 1
                assert task.cancelled() or type(task.exception()) is failpoints.POINTS[point]
            assert made.is_clean(), point
        await made.attach(device)


@DEVICES
async def test_attach_when_qemu_dies_at_any_step_then_its_end_is_told_and_nothing_stays(
    device: Device,
) -> None:
    # Behind the last step nothing waits any more: the next call tells.
    for point in points(device)[:-1]:
        async with rig() as made:
            with failpoints.calling(point, made.qemu.close), pytest.raises(VmmExitedError):
                await made.attach(device)
            assert made.taps.open == 0, point
            assert made.engine.topology == ONE_PORT
            assert made.engine.plugged == ()


@DEVICES
@pytest.mark.parametrize("action", ["error", "cancel"])
async def test_detach_when_any_step_fails_then_it_is_plugged_in_as_before(
    device: Device, action: str
) -> None:
    async with rig() as made:
        await made.attach(device)
        whole = made.devices.everything()
        for point in points(device, detach=True):
            with failpoints.armed(f"{point}=1*{action}") as hits:
                task = asyncio.create_task(made.detach(device))
                await asyncio.wait([task])
                assert hits(point) == 1
                assert task.cancelled() or type(task.exception()) is failpoints.POINTS[point]
            assert made.devices.everything() == whole, point
            assert [plugged.device for plugged in made.engine.plugged] == [device]
        await made.detach(device)
        assert made.is_clean()


@DEVICES
async def test_detach_when_the_guest_is_not_asked_and_it_fails_then_it_is_plugged_in_as_before(
    device: Device,
) -> None:
    async with rig() as made:
        await made.engine.attach(made.client, device, None)
        whole = made.devices.everything()

        with (
            failpoints.armed("qemu.device_del.after=1*error"),
            pytest.raises(HypervisorError, match="failpoint"),
        ):
            await made.engine.detach(made.client, device.id, None)

        assert made.devices.everything() == whole
        assert [(one.device, one.guest_name) for one in made.engine.plugged] == [(device, None)]


async def test_detach_when_plugged_in_again_then_the_guests_new_name_is_known() -> None:
    async with rig() as made:
        await made.attach(DISK)
        made.guest.name = "vdc"

        with failpoints.armed("guest.gone=1*error"), pytest.raises(AgentConnectionError):
            await made.detach(DISK)

        assert [one.guest_name for one in made.engine.plugged] == ["vdc"]
        # Once for its place, once for its name.
        assert len(made.written) == 2


async def test_detach_when_the_guest_does_not_see_it_come_back_then_told_and_another_detach_ends_it() -> None:
    async with rig() as made:
        await made.attach(DISK)
        made.guest.error = DeadlineExceededError("not seen")

        with pytest.raises(ExceptionGroup) as caught:
            await made.detach(DISK)

        assert [str(error) for error in caught.value.exceptions] == ["not seen", "not seen"]
        assert [one.device for one in made.engine.plugged] == [DISK]
        made.guest.error = None
        await made.detach(DISK)
        assert made.is_clean()


@DEVICES
async def test_detach_when_qemu_dies_at_any_step_then_its_end_is_told(device: Device) -> None:
    for point in points(device, detach=True):
        async with rig() as made:
            await made.attach(device)
            with failpoints.calling(point, made.qemu.close), pytest.raises(VmmExitedError):
                await made.detach(device)
            assert made.taps.open == 0, point


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
async def test_attach_when_qemu_does_not_answer_then_deadline_and_what_it_may_have_done_is_undone(
    command: str,
) -> None:
    async with rig(timeouts=TimeoutConfig(control_s=0.05)) as made:
        do = made.qemu.answers[command]

        def late(given: dict[str, Any]) -> object:
            assert callable(do)
            do(given)
            return SILENCE

        made.qemu.answers[command] = late

        with pytest.raises(DeadlineExceededError, match=command):
            await made.attach(DISK)

        assert made.is_clean()


async def test_attach_when_qemu_refuses_then_what_is_anothers_stays() -> None:
    async with rig() as made:
        made.devices.nodes.add("drive-disk0")

        with pytest.raises(QmpError, match="Duplicate nodes"):
            await made.attach(DISK)

        assert made.devices.everything() == {"drive-disk0"}
        assert made.engine.topology == ONE_PORT


async def test_attach_when_the_guest_never_has_it_then_it_is_taken_away_again() -> None:
    async with rig() as made:
        made.guest.error = DeadlineExceededError("nothing is at that address")

        with pytest.raises(DeadlineExceededError, match="nothing is at that address"):
            await made.attach(NIC)

        assert made.is_clean()


async def test_attach_when_undoing_fails_then_both_are_told_and_detach_goes_on_with_it() -> None:
    async with rig(timeouts=TimeoutConfig(hotplug_s=0.05)) as made:
        made.devices.lets_go = False
        with (
            failpoints.armed("qemu.device_add.after=1*error(first)"),
            pytest.raises(ExceptionGroup) as caught,
        ):
            await made.attach(DISK)
        first, second, third = caught.value.exceptions
        assert (str(first), type(second), type(third)) == ("first", DeadlineExceededError, QmpError)
        assert first.__notes__ == ["not undone of 'attach disk0': qemu.device_add, qemu.blockdev_add"]
        with pytest.raises(AlreadyExistsError):
            await made.attach(DISK)

        made.devices.let_go("virtio-disk0")
        await made.detach(DISK)

        assert made.is_clean()


async def test_attach_when_the_place_cannot_be_written_then_nothing_is_made() -> None:
    async with rig() as made:

        async def full() -> None:
            raise HostError("no space left", errno=28)

        engine = AsyncHotplug(ONE_PORT, "q35", FAST, full, made.taps.natives())

        with pytest.raises(HostError, match="no space left"):
            await engine.attach(made.client, NIC, made.guest.ask)

        assert engine.topology == ONE_PORT
        assert made.devices.everything() == set()


async def test_attach_when_there_is_no_place_or_name_then_refused_before_anything_is_sent() -> None:
    async with rig() as made:
        await made.attach(DISK)
        sent = len(made.qemu.commands)

        with pytest.raises(AlreadyExistsError):
            await made.attach(DISK)
        with pytest.raises(ResourceExhaustedError, match="all 1 places"):
            await made.attach(NIC)
        for mac in ("", "02:00", "01:00:00:00:00:01", "00:00:00:00:00:00", "02-00-00-00-00-01"):
            with pytest.raises(InvalidConfigError):
                await made.attach(NicDevice(id="nic0", mac=mac))
        with pytest.raises(NotFoundError, match="there are: disk0"):
            await made.detach(NIC)

        assert len(made.qemu.commands) == sent


async def test_attach_when_the_machine_has_no_ports_then_is_unsupported() -> None:
    async with rig(Topology()) as made:
        with pytest.raises(UnsupportedError, match="use machine 'q35'"):
            await made.attach(DISK)


async def test_attach_when_two_come_at_once_then_one_after_the_other() -> None:
    two = Topology(bridges=(*ONE_PORT.bridges, Bridge(id="rp1", kind=BridgeKind.ROOT_PORT, address="10")))
    async with rig(two) as made:
        await asyncio.gather(
            made.engine.attach(made.client, DISK, None), made.engine.attach(made.client, NIC, None)
        )

        names = [command.get("execute") for command in made.qemu.commands[1:]]
        assert names == ["blockdev-add", "device_add", "getfd", "netdev_add", "device_add"]
        assert [plugged.pci_path for plugged in made.engine.plugged] == ["0f/00", "10/00"]


@DEVICES
async def test_engine_when_made_from_what_another_wrote_then_it_goes_on_with_the_same_map(
    device: Device,
) -> None:
    two = Topology(bridges=(*ONE_PORT.bridges, Bridge(id="rp1", kind=BridgeKind.ROOT_PORT, address="10")))
    async with rig(two) as made:
        await made.attach(device)
        document = msgspec.json.encode(
            {"topology": made.written[-1], "devices": [attachment_of(one) for one in made.engine.plugged]}
        )

        topology = msgspec.convert(msgspec.json.decode(document)["topology"], Topology, str_keys=True)
        (attachment,) = msgspec.convert(msgspec.json.decode(document)["devices"], tuple[Attachment, ...])
        other = AsyncHotplug(topology, "q35", FAST, no_one, made.taps.natives(), [plugged_of(attachment)])

        more = NicDevice(id="nic7", mac=NIC.mac)
        assert (await other.attach(made.client, more, None)).pci_path == "10/00"
        with failpoints.armed("qemu.device_del.after=1*error"), pytest.raises(HypervisorError):
            await other.detach(made.client, device.id, made.guest.ask)
        assert len(made.devices.devices) == 2
        for one in (device, more):
            await other.detach(made.client, one.id, None)
        assert (made.devices.everything(), other.topology, other.plugged) == (set(), two, ())


async def test_engine_when_a_device_of_the_document_has_no_place_then_it_is_not_plugged_in() -> None:
    async with rig() as made:
        left = PluggedDevice(device=DISK, pci_path="0f/00")

        engine = AsyncHotplug(ONE_PORT, "q35", FAST, no_one, made.taps.natives(), [left])

        assert engine.plugged == ()
        with pytest.raises(NotFoundError):
            await engine.detach(made.client, "disk0", None)


async def test_detach_when_the_guest_takes_its_time_then_other_commands_go_on() -> None:
    async with rig() as made:
        await made.attach(DISK)
        made.devices.lets_go = False
        removal = asyncio.create_task(made.detach(DISK))
        await asyncio.to_thread(made.qemu.await_command, "device_del")

        assert await made.client.execute("query-status", timeout_s=5) == {}
        assert not removal.done()
        made.devices.let_go("virtio-disk0")
        await removal

        assert made.is_clean()


async def test_detach_when_the_guest_refuses_then_told_and_it_stays() -> None:
    async with rig() as made:
        await made.attach(DISK)

        def refuse(command: dict[str, Any]) -> object:
            made.qemu.event("DEVICE_UNPLUG_GUEST_ERROR", device="virtio-disk0", path="/machine/x")
            return {}

        whole, made.qemu.answers["device_del"] = made.devices.everything(), refuse

        with pytest.raises(HypervisorError, match="refused to let 'virtio-disk0' go"):
            await made.detach(DISK)

        assert made.devices.everything() == whole


async def test_detach_when_given_up_and_asked_again_then_the_first_wish_serves() -> None:
    async with rig(timeouts=TimeoutConfig(hotplug_s=0.05)) as made:
        await made.attach(DISK)
        made.devices.lets_go = False
        with pytest.raises(DeadlineExceededError, match="DEVICE_DELETED"):
            await made.detach(DISK)
        again = asyncio.create_task(made.detach(DISK))
        await asyncio.sleep(0)

        made.devices.let_go("virtio-disk0")
        await again

        assert made.is_clean()


async def test_detach_when_the_back_end_is_refused_then_it_is_plugged_in_again() -> None:
    async with rig() as made:
        await made.attach(NIC)
        whole = made.devices.everything()
        made.qemu.answers["netdev_del"] = Refusal("GenericError", "busy")

        with pytest.raises(QmpError, match="busy"):
            await made.detach(NIC)

        assert made.devices.everything() == whole
        assert [asked["gone"] for asked in made.guest.asked] == [False, True, False]
