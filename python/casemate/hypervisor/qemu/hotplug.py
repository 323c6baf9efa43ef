"""Plans that plug a device into a running QEMU and take it away again. Pure: what is done, in which order, undone how."""

from __future__ import annotations

import re
from typing import Any

from casemate.config.sandbox import TimeoutConfig
from casemate.errors import InvalidConfigError
from casemate.hypervisor import BlockDevice, NicDevice
from casemate.hypervisor.pci import Place
from casemate.hypervisor.qemu import devices
from casemate.hypervisor.qemu.plan import block_node, check_disk, check_id, disk_device
from casemate.transaction import AwaitedEvent, GuestCall, NativeCall, Plan, QmpCall, Refusal, Step

__all__ = ["check_device", "plan_attach", "plan_detach"]

_NO_DEVICE = Refusal(error_class="DeviceNotFound")
_NO_NODE = Refusal(text="Failed to find node")
_NO_FD = Refusal(text="not found")
_PENDING = Refusal(text="already in the process of unplug")
_THERE_ALREADY = Refusal(text="Duplicate device ID")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def check_device(device: BlockDevice | NicDevice) -> None:
    """Raise InvalidConfigError when ``device`` can't be handed to QEMU."""
    if isinstance(device, BlockDevice):
        check_disk(device)
        return
    if fault := check_id(device.id):
        raise InvalidConfigError(f"the network interface {fault}", path="id")
    if not _MAC.fullmatch(device.mac.lower()):
        raise InvalidConfigError(
            f"mac is {device.mac!r}, six pairs of hexadecimal digits with colons are expected", path="mac"
        )
    if int(device.mac[:2], 16) & 1:
        raise InvalidConfigError(
            f"mac is {device.mac!r}, an address of a single interface is expected: an even first pair",
            path="mac",
        )
    if int(device.mac.replace(":", ""), 16) == 0:
        raise InvalidConfigError("mac is all zeros, no interface has that address", path="mac")


def plan_attach(
    device: BlockDevice | NicDevice, place: Place, timeouts: TimeoutConfig, *, check: bool
) -> Plan:
    """The plan that plugs ``device`` in at ``place``; with ``check`` the guest is asked whether it has it."""
    make = _attach_block if isinstance(device, BlockDevice) else _attach_nic
    steps = make(device, place, timeouts)  # type: ignore[arg-type]  # chosen by the type above
    if check:
        steps = (*steps, _check(device, place, timeouts, gone=False))
    return Plan(name=f"attach {device.id}", steps=steps)


def plan_detach(
    device: BlockDevice | NicDevice, place: Place, timeouts: TimeoutConfig, *, check: bool
) -> Plan:
    """The plan that takes ``device`` away; what fails before the last step leaves it plugged in, or plugs it in again."""
    replug: tuple[Any, ...] = (_device_add(device, place, tolerant=True),)
    if check:
        replug = (*replug, _ask(device, place, gone=False))
    unplug = Step(
        name="qemu.device_del",
        action=_device_del(device),
        limit_s=timeouts.hotplug_s,
        undo=replug,
    )
    checks = (_check(device, place, timeouts, gone=True),) if check else ()
    back_end = (
        Step(name="qemu.blockdev_del", action=_blockdev_del(device), limit_s=timeouts.control_s, final=True)
        if isinstance(device, BlockDevice)
        else Step(name="qemu.netdev_del", action=_netdev_del(device), limit_s=timeouts.control_s, final=True)
    )
    return Plan(name=f"detach {device.id}", steps=(unplug, *checks, back_end))


def _attach_block(disk: BlockDevice, place: Place, timeouts: TimeoutConfig) -> tuple[Step, ...]:
    return (
        Step(
            name="qemu.blockdev_add",
            action=QmpCall(command="blockdev-add", arguments=block_node(disk).properties()),
            limit_s=timeouts.control_s,
            undo=(_blockdev_del(disk),),
        ),
        _plug(disk, place, timeouts),
    )


def _attach_nic(nic: NicDevice, place: Place, timeouts: TimeoutConfig) -> tuple[Step, ...]:
    close = NativeCall(function="tap.close", result_of="tap.create")
    name = _netdev(nic)
    return (
        Step(
            name="tap.create",
            action=NativeCall(
                function="tap.create",
                arguments={"name": nic.tap, "netns": nic.netns, "owner": nic.owner},
            ),
            limit_s=timeouts.control_s,
            undo=(close,),
        ),
        Step(
            name="qemu.getfd",
            action=QmpCall(command="getfd", arguments={"fdname": name}, fd_of="tap.create"),
            limit_s=timeouts.control_s,
            undo=(QmpCall(command="closefd", arguments={"fdname": name}, done_already=_NO_FD),),
        ),
        Step(
            name="qemu.netdev_add",
            action=QmpCall(command="netdev_add", arguments={"type": "tap", "id": name, "fd": name}),
            limit_s=timeouts.control_s,
            undo=(_netdev_del(nic),),
        ),
        # From here on the tap device is QEMU's alone, and goes with it however it ends.
        Step(name="tap.hand_over", action=close, limit_s=timeouts.control_s),
        _plug(nic, place, timeouts),
    )


def _plug(device: BlockDevice | NicDevice, place: Place, timeouts: TimeoutConfig) -> Step:
    return Step(
        name="qemu.device_add",
        action=_device_add(device, place),
        limit_s=timeouts.control_s,
        undo=(_device_del(device),),
        undo_limit_s=timeouts.hotplug_s,
    )


def _check(device: BlockDevice | NicDevice, place: Place, timeouts: TimeoutConfig, *, gone: bool) -> Step:
    return Step(
        name="guest.gone" if gone else "guest.there",
        action=_ask(device, place, gone=gone),
        limit_s=timeouts.hotplug_s,
        check=True,
    )


def _ask(device: BlockDevice | NicDevice, place: Place, *, gone: bool) -> GuestCall:
    subsystem = "block" if isinstance(device, BlockDevice) else "net"
    return GuestCall(
        method="AwaitDevice", arguments={"subsystem": subsystem, "pci_path": place.path, "gone": gone}
    )


def _device_add(device: BlockDevice | NicDevice, place: Place, *, tolerant: bool = False) -> QmpCall:
    made: devices.Device
    if isinstance(device, BlockDevice):
        made = disk_device(device, {"bus": place.bridge, "slot": place.slot})
    else:
        made = devices.VirtioNet(
            id=_qemu_id(device), netdev=_netdev(device), mac=device.mac, bus=place.bridge, slot=place.slot
        )
    return QmpCall(
        command="device_add",
        arguments={"driver": made.driver, **made.properties()},
        done_already=_THERE_ALREADY if tolerant else None,
    )


def _device_del(device: BlockDevice | NicDevice) -> QmpCall:
    name = _qemu_id(device)
    return QmpCall(
        command="device_del",
        arguments={"id": name},
        # DEVICE_DELETED comes for the device's inner parts too: those have no name.
        awaits=AwaitedEvent(
            name="DEVICE_DELETED", refused="DEVICE_UNPLUG_GUEST_ERROR", match={"device": name}
        ),
        done_already=_NO_DEVICE,
        # An earlier wish, given up at its deadline, still stands: its event serves us too.
        under_way=_PENDING,
    )


def _blockdev_del(disk: BlockDevice) -> QmpCall:
    return QmpCall(
        command="blockdev-del", arguments={"node-name": block_node(disk).name}, done_already=_NO_NODE
    )


def _netdev_del(nic: NicDevice) -> QmpCall:
    return QmpCall(command="netdev_del", arguments={"id": _netdev(nic)}, done_already=_NO_DEVICE)


def _qemu_id(device: BlockDevice | NicDevice) -> str:
    return f"virtio-{device.id}"


def _netdev(nic: NicDevice) -> str:
    return f"net-{nic.id}"
