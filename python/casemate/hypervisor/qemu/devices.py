"""QEMU's devices and back ends as values. Each knows its properties, for the command line and for QMP alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import msgspec

from casemate.hypervisor.qemu.options import Value, render

__all__ = [
    "BlockNode",
    "Chardev",
    "Device",
    "MemoryBackend",
    "PciePciBridge",
    "PcieRootPort",
    "RngBackend",
    "VhostUserVsock",
    "VhostVsock",
    "VirtioBlk",
    "VirtioNet",
    "VirtioRng",
]

ROOT_BUS = "pcie.0"


class Chardev(msgspec.Struct, frozen=True, kw_only=True):
    """A socket that was made before: a listener (``server``) or a connected end, by descriptor, or a path to connect to.

    Args:
        id: Its name for those who use it.
        fd: Number of the descriptor in QEMU.
        path: Socket to connect to, in place of ``fd``.
        server: ``fd`` is a listener; QEMU runs on without a peer.
    """

    id: str
    fd: int | None = None
    path: str | None = None
    server: bool = False

    def arguments(self) -> list[str]:
        """For the command line."""
        source: dict[str, Value] = {"path": self.path or ""} if self.fd is None else {"fd": self.fd}
        listening: dict[str, Value] = {"server": True, "wait": False} if self.server else {}
        return ["-chardev", render("socket", {"id": self.id, **source, **listening})]


class MemoryBackend(msgspec.Struct, frozen=True, kw_only=True):
    """All guest memory in an anonymous file, shared with back ends in other processes."""

    id: str
    size_mib: int

    def arguments(self) -> list[str]:
        """For the command line."""
        properties: dict[str, Value] = {"id": self.id, "size": f"{self.size_mib}M", "share": True}
        return ["-object", render("memory-backend-memfd", properties)]


class RngBackend(msgspec.Struct, frozen=True, kw_only=True):
    """Random numbers of the host."""

    id: str
    filename: str = "/dev/urandom"

    def arguments(self) -> list[str]:
        """For the command line."""
        return ["-object", render("rng-random", {"id": self.id, "filename": self.filename})]


class BlockNode(msgspec.Struct, frozen=True, kw_only=True):
    """A raw file as a block node.

    A read-only file is opened without a lock, so that many VMs share it and one that is being replaced can be opened.
    """

    name: str
    path: str
    read_only: bool
    host_device: bool = False
    discard: bool = False
    direct: bool = False

    def properties(self) -> dict[str, Any]:
        """For ``blockdev-add``."""
        shared: dict[str, Any] = {}
        if self.discard:
            shared["discard"] = "unmap"
        if self.direct:
            shared["cache"] = {"direct": True}
        file: dict[str, Any] = {
            "driver": "host_device" if self.host_device else "file",
            "filename": self.path,
            **shared,
        }
        if self.read_only:
            file["locking"] = "off"
        return {"driver": "raw", "node-name": self.name, "read-only": self.read_only, **shared, "file": file}

    def arguments(self) -> list[str]:
        """For the command line."""
        return ["-blockdev", render(None, dict(_flat("", self.properties())))]


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device of the machine.

    Args:
        id: Its name, under which it is removed.
        bus: The bus it is on; None: the machine chooses (MMIO).
        slot: Slot on that bus; None: the machine chooses.
    """

    id: str
    bus: str | None = None
    slot: int | None = None

    pci_driver: ClassVar[str] = ""
    mmio_driver: ClassVar[str] = ""

    @property
    def driver(self) -> str:
        """The driver's name for the device's bus."""
        return self.mmio_driver if self.bus is None else self.pci_driver

    def properties(self) -> dict[str, Value]:
        """All but the driver; for ``device_add`` too."""
        placed: dict[str, Value] = {"id": self.id}
        if self.bus is not None:
            placed["bus"] = self.bus
        if self.slot is not None:
            placed["addr"] = f"0x{self.slot:02x}"
        return placed

    def arguments(self) -> list[str]:
        """For the command line."""
        return ["-device", render(self.driver, self.properties())]


class PcieRootPort(Device, frozen=True, kw_only=True):
    """A port of the root bus that one device can be plugged into later."""

    number: int

    pci_driver: ClassVar[str] = "pcie-root-port"

    def properties(self) -> dict[str, Value]:
        """All but the driver. The chassis and slot numbers make the port's name in the guest unique; chassis 0 is the root's."""
        return {**super().properties(), "chassis": self.number + 1, "slot": self.number + 1}


class PciePciBridge(Device, frozen=True, kw_only=True):
    """A conventional bus behind a root port, for many devices."""

    pci_driver: ClassVar[str] = "pcie-pci-bridge"


class VirtioBlk(Device, frozen=True, kw_only=True):
    """A disk over the block node ``node``."""

    node: str
    serial: str
    read_only: bool = True

    pci_driver: ClassVar[str] = "virtio-blk-pci"
    mmio_driver: ClassVar[str] = "virtio-blk-device"

    def properties(self) -> dict[str, Value]:
        """All but the driver."""
        shared: dict[str, Value] = {"share-rw": True} if self.read_only else {}
        return {
            **super().properties(),
            "drive": self.node,
            "serial": self.serial,
            "config-wce": False,
            **shared,
        }


class VirtioNet(Device, frozen=True, kw_only=True):
    """A network interface over the back end ``netdev``. No option ROM: nobody boots from an interface that came later."""

    netdev: str
    mac: str

    pci_driver: ClassVar[str] = "virtio-net-pci"
    mmio_driver: ClassVar[str] = "virtio-net-device"

    def properties(self) -> dict[str, Value]:
        """All but the driver."""
        return {**super().properties(), "netdev": self.netdev, "mac": self.mac, "romfile": ""}


class VirtioRng(Device, frozen=True, kw_only=True):
    """Random numbers from the back end ``rng``."""

    rng: str

    pci_driver: ClassVar[str] = "virtio-rng-pci"
    mmio_driver: ClassVar[str] = "virtio-rng-device"

    def properties(self) -> dict[str, Value]:
        """All but the driver."""
        return {**super().properties(), "rng": self.rng}


class VhostVsock(Device, frozen=True, kw_only=True):
    """vsock served by the host's kernel; ``vhost_fd`` is the descriptor in QEMU that holds the context id."""

    guest_cid: int
    vhost_fd: int

    pci_driver: ClassVar[str] = "vhost-vsock-pci"
    mmio_driver: ClassVar[str] = "vhost-vsock-device"

    def properties(self) -> dict[str, Value]:
        """All but the driver."""
        return {**super().properties(), "vhostfd": str(self.vhost_fd), "guest-cid": self.guest_cid}


class VhostUserVsock(Device, frozen=True, kw_only=True):
    """vsock served by a process at the other end of ``chardev``."""

    chardev: str

    pci_driver: ClassVar[str] = "vhost-user-vsock-pci"
    mmio_driver: ClassVar[str] = "vhost-user-vsock-device"

    def properties(self) -> dict[str, Value]:
        """All but the driver."""
        return {**super().properties(), "chardev": self.chardev}


def _flat(prefix: str, properties: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Nested properties by their dotted names, as the command line wants them."""
    for name, value in properties.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
