"""What every hypervisor driver speaks of: guest assets, disks, where the guest finds them, and what a VMM can do.

The drivers themselves wait and live in ``casemate._async.hypervisor``; their common interface is there too. Here is what both faces share.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "BlockAddress",
    "BlockDevice",
    "Capabilities",
    "GuestAssets",
    "NicDevice",
    "PluggedDevice",
    "VmmProcess",
]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a VMM with its machine can do.

    Args:
        block_hotplug: Disks can come and go while it runs.
        network_hotplug: Network interfaces can.
        vcpu_hotplug: vCPUs can.
        memory_hotplug: Memory can.
        pause: The vCPUs can be stopped and continued.
        pci: Devices have PCI paths; else they are found by their serial number.
        max_vcpus: The most vCPUs.
    """

    block_hotplug: bool
    network_hotplug: bool
    vcpu_hotplug: bool
    memory_hotplug: bool
    pause: bool
    pci: bool
    max_vcpus: int


class GuestAssets(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest boots from.

    Args:
        kernel: Path of the kernel.
        initrd: Path of the initrd, with the agent as ``/init``.
        image: Path of a raw disk image in place of the initrd; attached read-only as the first disk.
        parameters: The kernel's parameters, complete and in order.
        pvm: The kernel says that it runs as a PVM guest.
    """

    kernel: str
    initrd: str | None = None
    image: str | None = None
    parameters: tuple[str, ...] = ()
    pvm: bool = False


class BlockDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A raw file or block device for the guest.

    Args:
        id: Name in the VMM, unique in the sandbox: letters, digits, ``-``, ``_``, ``.``, at most 31 characters.
        path: The file or device on the host.
        read_only: The guest can't write. Such a file may be shared by many VMs.
        host_device: ``path`` is a block device, not a regular file.
        discard: What the guest discards is given back to the file.
        direct: Past the host's page cache.
        serial: What the guest sees as its serial number, at most 20 characters.
    """

    id: str
    path: str
    read_only: bool = True
    host_device: bool = False
    discard: bool = False
    direct: bool = False
    serial: str


class NicDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface for the guest; its other side is a tap device that is made with it and goes with it.

    Args:
        id: Name in the VMM, as that of a :class:`BlockDevice`.
        mac: Its hardware address, six pairs of hexadecimal digits with colons.
        tap: Name of the tap device on the host; ``%d`` stands for the lowest free number.
        netns: Path of the network namespace of the tap device; None: this process's.
        owner: User id that may open the tap device too.
    """

    id: str
    mac: str
    tap: str = "cm%d"
    netns: str | None = None
    owner: int | None = None


class BlockAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the guest finds a disk.

    Args:
        id: Of the :class:`BlockDevice`.
        pci_path: Slots from the root bus, two hexadecimal digits each, joined by ``/``; None without PCI.
        serial: Its serial number.
    """

    id: str
    pci_path: str | None
    serial: str


class PluggedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was plugged into a running VM.

    Args:
        device: The device.
        pci_path: The slots on the way to it from the root bus.
        host_name: Name of its tap device, empty for a disk.
        guest_name: What the guest calls it (``vdb``, ``eth0``); None: the guest was not asked.
        guest_mac: The hardware address that the guest sees.
    """

    device: BlockDevice | NicDevice
    pci_path: str
    host_name: str = ""
    guest_name: str | None = None
    guest_mac: str = ""


class VmmProcess(msgspec.Struct, frozen=True, kw_only=True):
    """The VMM's process: ``pid`` and its start in clock ticks since the host's boot, which tells it from a later one."""

    pid: int
    start_time_ticks: int
