"""What a guest, its QEMU and the host show of the devices that were attached: three views that must agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from casemate import BlockAttachment, NicAttachment
from tests.support.netns import links

__all__ = [
    "LIST_DEVICES",
    "View",
    "expected_guest",
    "expected_qemu",
    "guest_view",
    "host_view",
    "qemu_queries",
    "qemu_view",
]

LIST_DEVICES = """
for disk in /sys/block/vd*; do
    [ -e "$disk" ] && echo "block /dev/${disk##*/} $(cat $disk/serial) $(cat $disk/ro) $(readlink -f $disk)"
done
for link in /sys/class/net/*; do
    [ "${link##*/}" = lo ] || echo "net ${link##*/} $(cat $link/address) - $(readlink -f $link)"
done
"""
"""Run in a container that has the guest's network: one line a device."""

Attachment = BlockAttachment | NicAttachment


class View(msgspec.Struct, frozen=True, order=True):
    """A device as it is seen: its kind, its name there, what tells it from others, where it is."""

    kind: str
    name: str
    identity: str
    place: str


def guest_view(listing: str, image_serials: set[str]) -> set[View]:
    """From the output of ``LIST_DEVICES``, without the disks of images."""
    views = set()
    for line in listing.splitlines():
        kind, name, identity, read_only, path = line.split()
        if identity not in image_serials:
            views.add(View(kind, name, f"{identity} {read_only}", _slots(path)))
    return views


def expected_guest(attached: list[Attachment]) -> set[View]:
    """What the guest must show."""
    return {
        View("block", str(one.device), f"{one.id} {int(one.readonly)}", one.pci_path)
        if isinstance(one, BlockAttachment)
        else View("net", str(one.interface), f"{one.mac} -", one.pci_path)
        for one in attached
    }


def qemu_queries() -> list[tuple[str, dict[str, Any] | None]]:
    """The commands behind :func:`qemu_view`."""
    return [("query-pci", None), ("query-block", None), ("query-named-block-nodes", {"flat": True})]


def qemu_view(answers: list[Any]) -> dict[str, set[str]]:
    """Devices behind root ports by bus and name, inserted nodes, and nodes with a name of ours."""
    buses, blocks, nodes = answers
    bridges = [device for device in buses[0]["devices"] if "pci_bridge" in device]
    return {
        "pci": {found for bridge in bridges for found in _behind(bridge, "")},
        "block": {block["inserted"]["node-name"] for block in blocks if "inserted" in block},
        "nodes": {node["node-name"] for node in nodes if not node["node-name"].startswith("#")},
    }


def _behind(bridge: dict[str, Any], above: str) -> Iterator[str]:
    path = f"{above}{bridge['slot']:02x}/"
    for device in bridge["pci_bridge"].get("devices", []):
        if "pci_bridge" in device:
            yield from _behind(device, path)
        else:
            yield f"{path}{device['slot']:02x} {device['qdev_id']}"


def expected_qemu(attached: list[Attachment], image_nodes: set[str]) -> dict[str, set[str]]:
    """What QEMU must show."""
    nodes = {f"drive-{one.id}" for one in attached if isinstance(one, BlockAttachment)} | image_nodes
    return {
        "pci": {f"{one.pci_path} virtio-{one.id}" for one in attached},
        "block": nodes,
        "nodes": nodes,
    }


def host_view(namespace: str) -> set[str]:
    """Tap devices that are up in a network namespace."""
    return {name for name, link in links(namespace).items() if "UP" in link["flags"]}


def _slots(path: str) -> str:
    """``/sys/devices/pci0000:00/0000:00:0f.0/0000:01:00.0/virtio4/…`` is ``0f/00``."""
    parts = [part for part in path.split("/") if part.count(":") == 2]
    return "/".join(part.split(":")[2].removesuffix(".0") for part in parts)
