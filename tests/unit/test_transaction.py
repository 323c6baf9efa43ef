from __future__ import annotations

import pytest

from casemate.config.sandbox import TimeoutConfig
from casemate.hypervisor import BlockDevice, NicDevice
from casemate.hypervisor.pci import Place
from casemate.hypervisor.qemu.hotplug import plan_attach, plan_detach
from casemate.transaction import QmpCall, Refusal

PLACE = Place(bridge="rp3", slot=0, path="12/00")
TIMEOUTS = TimeoutConfig(control_s=10, hotplug_s=30)
DISK = BlockDevice(id="disk0", path="/d.img", read_only=False, serial="disk0")
NIC = NicDevice(id="nic0", mac="02:00:00:00:00:01")

ATTACH_DISK = """\
attach disk0
  1. qemu.blockdev_add: blockdev-add driver=raw node-name=drive-disk0 read-only=False file={'driver': 'file', \
'filename': '/d.img'}, within 10 s; undone by blockdev-del node-name=drive-disk0, within 10 s
  2. qemu.device_add: device_add driver=virtio-blk-pci id=virtio-disk0 bus=rp3 addr=0x00 drive=drive-disk0 \
serial=disk0 config-wce=False, within 10 s; undone by device_del id=virtio-disk0, then DEVICE_DELETED, \
within 30 s
  3. guest.there [check]: ask the guest: AwaitDevice subsystem=block pci_path=12/00 gone=False, within 30 s"""

DETACH_NIC = """\
detach nic0
  1. qemu.device_del: device_del id=virtio-nic0, then DEVICE_DELETED, within 30 s; undone by device_add \
driver=virtio-net-pci id=virtio-nic0 bus=rp3 addr=0x00 netdev=net-nic0 mac=02:00:00:00:00:01 romfile=; \
ask the guest: AwaitDevice subsystem=net pci_path=12/00 gone=False, within 30 s
  2. guest.gone [check]: ask the guest: AwaitDevice subsystem=net pci_path=12/00 gone=True, within 30 s
  3. qemu.netdev_del: netdev_del id=net-nic0, within 10 s"""


def test_describe_when_a_plan_is_shown_then_each_step_with_its_undo_and_deadline() -> None:
    assert plan_attach(DISK, PLACE, TIMEOUTS, check=True).describe() == ATTACH_DISK
    assert plan_detach(NIC, PLACE, TIMEOUTS, check=True).describe() == DETACH_NIC


def test_plan_when_the_guest_is_not_asked_then_nothing_of_it_is_in_the_plan() -> None:
    for make in (plan_attach, plan_detach):
        for device in (DISK, NIC):
            assert "guest" not in make(device, PLACE, TIMEOUTS, check=False).describe()


def test_plan_when_a_nic_is_attached_then_the_tap_is_handed_over_before_the_device_is_there() -> None:
    names = [step.name for step in plan_attach(NIC, PLACE, TIMEOUTS, check=True).steps]

    assert names == [
        "tap.create",
        "qemu.getfd",
        "qemu.netdev_add",
        "tap.hand_over",
        "qemu.device_add",
        "guest.there",
    ]


def test_plan_when_a_disk_has_options_then_they_stand_at_both_levels() -> None:
    disk = BlockDevice(
        id="disk1",
        path="/dev/loop0",
        host_device=True,
        discard=True,
        direct=True,
        read_only=False,
        serial="s",
    )

    first = plan_attach(disk, PLACE, TIMEOUTS, check=False).steps[0].action

    shared = {"discard": "unmap", "cache": {"direct": True}}
    assert isinstance(first, QmpCall)
    assert first.arguments == {
        "driver": "raw",
        "node-name": "drive-disk1",
        "read-only": False,
        **shared,
        "file": {"driver": "host_device", "filename": "/dev/loop0", **shared},
    }


@pytest.mark.parametrize(
    ("error_class", "text", "covered"),
    [("DeviceNotFound", "x", True), ("GenericError", "x", False), ("DeviceNotFound", "", True)],
)
def test_refusal_when_compared_then_by_class_and_text(error_class: str, text: str, covered: bool) -> None:
    assert Refusal(error_class="DeviceNotFound").covers(error_class, text) is covered
    assert Refusal(text="no node").covers("Any", "there is no node here")
    assert not Refusal(text="no node").covers("Any", "there is one")
