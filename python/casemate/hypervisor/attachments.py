"""What was plugged in, as its user sees it and as it stands in the state document, and back. Pure."""

from __future__ import annotations

from casemate.hypervisor import BlockDevice, NicDevice, PluggedDevice
from casemate.types import Attachment, BlockAttachment, NicAttachment

__all__ = ["attachment_of", "plugged_of"]

_DEV = "/dev/"


def attachment_of(plugged: PluggedDevice) -> Attachment:
    """A plugged device as an attachment."""
    device, name = plugged.device, plugged.guest_name
    if isinstance(device, BlockDevice):
        return BlockAttachment(
            id=device.id,
            path=device.path,
            readonly=device.read_only,
            pci_path=plugged.pci_path,
            device=None if name is None else f"{_DEV}{name}",
        )
    return NicAttachment(
        id=device.id,
        mac=device.mac,
        tap=plugged.host_name,
        netns=device.netns,
        pci_path=plugged.pci_path,
        interface=name,
    )


def plugged_of(attachment: Attachment) -> PluggedDevice:
    """An attachment as far as taking it away, or plugging it in again where its back end is still there, needs it."""
    if isinstance(attachment, BlockAttachment):
        disk = BlockDevice(
            id=attachment.id,
            path=attachment.path,
            read_only=attachment.readonly,
            serial=attachment.id,
        )
        name = None if attachment.device is None else attachment.device.removeprefix(_DEV)
        return PluggedDevice(device=disk, pci_path=attachment.pci_path, guest_name=name)
    nic = NicDevice(id=attachment.id, mac=attachment.mac, tap=attachment.tap, netns=attachment.netns)
    return PluggedDevice(
        device=nic,
        pci_path=attachment.pci_path,
        host_name=attachment.tap,
        guest_name=attachment.interface,
        guest_mac="" if attachment.interface is None else attachment.mac,
    )
