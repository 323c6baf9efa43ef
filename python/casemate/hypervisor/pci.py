"""PCI addresses, and which places for later devices are taken. Pure: a change gives a new topology.

A **slot** is 0 to 31, as text two hexadecimal digits; a **path** is the slots from the root bus down, joined by ``/``, each
with ``.function`` where that is not 0: ``"03"``, ``"0f.2/00"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum

import msgspec

from casemate.errors import AlreadyExistsError, InvalidConfigError, NotFoundError, ResourceExhaustedError

__all__ = ["Bridge", "BridgeKind", "PciAddress", "PciPath", "Place", "Topology"]

MAX_SLOT = 31
MAX_FUNCTION = 7
_HEX = frozenset("0123456789abcdefABCDEF")


class PciAddress(msgspec.Struct, frozen=True, order=True):
    """Slot and function on one bus.

    Raises:
        InvalidConfigError: Out of range.
    """

    slot: int
    function: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.slot <= MAX_SLOT:
            raise InvalidConfigError(f"PCI slot {self.slot} does not exist, 0 to {MAX_SLOT} do", path="slot")
        if not 0 <= self.function <= MAX_FUNCTION:
            raise InvalidConfigError(
                f"PCI function {self.function} does not exist, 0 to {MAX_FUNCTION} do", path="function"
            )

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """Read ``"1f"`` or ``"0f.2"``; zeros may lead. Raises: InvalidConfigError."""
        slot, dot, function = text.partition(".")
        if not _is_hex(slot) or (dot and not _is_hex(function)):
            raise InvalidConfigError(
                f"{text!r} is no PCI address, a hexadecimal slot is expected, with '.' and a function where that is not 0",
                path="slot",
            )
        return cls(int(slot, 16), int(function or "0", 16))

    def __str__(self) -> str:
        return f"{self.slot:02x}.{self.function}" if self.function else f"{self.slot:02x}"


class PciPath(msgspec.Struct, frozen=True):
    """The way from the root bus to a device; without parts it is the nil path, whose text is empty."""

    parts: tuple[PciAddress, ...] = ()

    @classmethod
    def parse(cls, text: str) -> PciPath:
        """Read the text. Raises: InvalidConfigError for an empty part and as :meth:`PciAddress.parse`."""
        return cls(tuple(map(PciAddress.parse, text.split("/")))) if text else cls()

    @classmethod
    def of_slots(cls, *slots: int) -> PciPath:
        """A path of functions 0. Raises: InvalidConfigError without slots, and out of range."""
        if not slots:
            raise InvalidConfigError("a PCI path needs at least one slot", path="slots")
        return cls(tuple(map(PciAddress, slots)))

    def child(self, address: PciAddress) -> PciPath:
        """The path of a device behind the bridge of this path."""
        return PciPath((*self.parts, address))

    def __str__(self) -> str:
        return "/".join(map(str, self.parts))


class BridgeKind(StrEnum):
    """What devices are plugged into."""

    ROOT_PORT = "root-port"
    """PCIe: one device."""
    PCIE_BRIDGE = "pcie-pci-bridge"
    """A conventional bus behind a root port: 30 devices."""
    PCI_BRIDGE = "pci-bridge"
    """A conventional bus on a conventional root bus: 30 devices."""

    @property
    def slots(self) -> range:
        """The slots that devices may have; slot 0 of a bridge is its controller's."""
        return range(1) if self is BridgeKind.ROOT_PORT else range(1, 31)


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A place of a device: the bridge that is its bus, its slot there, and the way to it from the root bus."""

    bridge: str
    slot: int
    path: str


class Bridge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bridge and what is behind it.

    Args:
        id: Its name in the VMM.
        address: On its parent's bus, as text.
        parent: Name of the bridge it is behind; empty: it is on the root bus.
        open: Later devices may be put behind it; else it only carries another bridge.
        devices: Names of devices by slot.
    """

    id: str
    kind: BridgeKind
    address: str
    parent: str = ""
    open: bool = True
    devices: Mapping[int, str] = {}

    @property
    def capacity(self) -> int:
        """How many devices fit."""
        return len(self.kind.slots) if self.open else 0

    def free_slots(self) -> Iterator[int]:
        """Slots with nothing in them, the lowest first."""
        return (slot for slot in self.kind.slots if slot not in self.devices) if self.open else iter(())

    def with_device(self, device_id: str) -> tuple[Bridge, int]:
        """With a device in the lowest free slot, and that slot. Raises: ResourceExhaustedError: no empty slot."""
        slot = next(self.free_slots(), None)
        if slot is None:
            raise ResourceExhaustedError(f"bridge {self.id} has no empty slot: all {self.capacity} are taken")
        return msgspec.structs.replace(self, devices={**self.devices, slot: device_id}), slot

    def without_device(self, device_id: str) -> Bridge:
        """With the device's slot free. Raises: NotFoundError: it is not there."""
        left = {slot: name for slot, name in self.devices.items() if name != device_id}
        if len(left) == len(self.devices):
            raise NotFoundError(f"device {device_id!r} is not behind bridge {self.id}")
        return msgspec.structs.replace(self, devices=left)


class Topology(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bridges of a machine, in the order in which they are filled, and the devices behind them."""

    bridges: tuple[Bridge, ...] = ()

    @property
    def capacity(self) -> int:
        """How many devices fit into all bridges."""
        return sum(bridge.capacity for bridge in self.bridges)

    @property
    def free_count(self) -> int:
        """How many more devices fit."""
        return self.capacity - len(self.places())

    def allocate(self, device_id: str) -> tuple[Topology, Place]:
        """A place for a device: the lowest free slot of the first bridge with room.

        Raises:
            AlreadyExistsError: A device of that name has a place.
            ResourceExhaustedError: There is no room.
        """
        if device_id in self.places():
            raise AlreadyExistsError(f"a device {device_id!r} has a place already")
        for index, bridge in enumerate(self.bridges):
            if next(bridge.free_slots(), None) is not None:
                filled, slot = bridge.with_device(device_id)
                bridges = (*self.bridges[:index], filled, *self.bridges[index + 1 :])
                return Topology(bridges=bridges), self._place(filled, slot)
        raise ResourceExhaustedError(f"no more bridge slots: all {self.capacity} are taken")

    def release(self, device_id: str) -> Topology:
        """With the device's place free. Raises: NotFoundError: it has none."""
        for index, bridge in enumerate(self.bridges):
            if device_id in bridge.devices.values():
                bridges = (
                    *self.bridges[:index],
                    bridge.without_device(device_id),
                    *self.bridges[index + 1 :],
                )
                return Topology(bridges=bridges)
        names = ", ".join(sorted(self.places())) or "none"
        raise NotFoundError(f"device {device_id!r} has no place; there are: {names}")

    def places(self) -> dict[str, Place]:
        """Every device's place, by its name."""
        return {
            name: self._place(bridge, slot)
            for bridge in self.bridges
            for slot, name in sorted(bridge.devices.items())
        }

    def path_of(self, bridge_id: str) -> PciPath:
        """The way from the root bus to a bridge. Raises: NotFoundError."""
        bridge = next((bridge for bridge in self.bridges if bridge.id == bridge_id), None)
        if bridge is None:
            raise NotFoundError(f"there is no bridge {bridge_id!r}")
        above = self.path_of(bridge.parent) if bridge.parent else PciPath()
        return above.child(PciAddress.parse(bridge.address))

    def _place(self, bridge: Bridge, slot: int) -> Place:
        path = self.path_of(bridge.id).child(PciAddress(slot))
        return Place(bridge=bridge.id, slot=slot, path=str(path))


def _is_hex(text: str) -> bool:
    return bool(text) and _HEX.issuperset(text)
