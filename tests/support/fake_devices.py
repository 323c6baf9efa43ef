"""The devices of a fake QEMU: what its hot-plug commands do, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.fake_qmp import FakeQmp, Refusal

__all__ = ["FakeDevices"]


class FakeDevices:
    """Nodes, back ends, named descriptors and devices by name, kept by the commands that ``qemu`` gets.

    Attributes:
        lets_go: Whether the guest gives a device back when it is asked to.
    """

    def __init__(self, qemu: FakeQmp) -> None:
        self.nodes: set[str] = set()
        self.netdevs: set[str] = set()
        self.fds: set[str] = set()
        self.devices: dict[str, dict[str, Any]] = {}
        self.pending: set[str] = set()
        self.lets_go = True
        self._qemu = qemu
        commands: dict[str, Callable[[dict[str, Any]], object]] = {
            "blockdev-add": lambda given: _add(self.nodes, given["node-name"], "Duplicate nodes"),
            "blockdev-del": self._remove_node,
            "getfd": lambda given: _add(self.fds, given["fdname"], "never"),
            "closefd": lambda given: _remove(self.fds, given["fdname"], "GenericError", "fd not found"),
            "netdev_add": self._add_netdev,
            "netdev_del": lambda given: _remove(self.netdevs, given["id"], "DeviceNotFound", "not found"),
            "device_add": self._add_device,
            "device_del": self._remove_device,
        }
        for name, function in commands.items():
            qemu.answers[name] = lambda command, function=function: function(command["arguments"])

    def everything(self) -> set[str]:
        """All names there are."""
        return self.nodes | self.netdevs | self.fds | set(self.devices)

    def let_go(self, name: str) -> None:
        """The guest gives the device back now."""
        self.devices.pop(name)
        self.pending.discard(name)
        self._qemu.event("DEVICE_DELETED", path=f"/machine/{name}/virtio-backend")
        self._qemu.event("DEVICE_DELETED", device=name, path=f"/machine/{name}")

    def _remove_node(self, given: dict[str, Any]) -> object:
        name = given["node-name"]
        if any(device.get("drive") == name for device in self.devices.values()):
            return Refusal("GenericError", f"Node {name} is in use")
        return _remove(self.nodes, name, "GenericError", "Failed to find node")

    def _add_netdev(self, given: dict[str, Any]) -> object:
        self.fds.remove(given["fd"])
        return _add(self.netdevs, given["id"], "Duplicate ID")

    def _add_device(self, given: dict[str, Any]) -> object:
        if given["id"] in self.devices:
            return Refusal("GenericError", f"Duplicate device ID '{given['id']}'")
        back_end = given.get("drive") or given.get("netdev")
        if back_end not in self.nodes | self.netdevs:
            return Refusal("GenericError", f"Cannot find {back_end}")
        self.devices[given["id"]] = given
        return {}

    def _remove_device(self, given: dict[str, Any]) -> object:
        name = given["id"]
        if name not in self.devices:
            return Refusal("DeviceNotFound", f"Device '{name}' not found")
        if name in self.pending:
            return Refusal("GenericError", f"Device {name} is already in the process of unplug")
        self.pending.add(name)
        if self.lets_go:
            self.let_go(name)
        return {}


def _add(names: set[str], name: str, text: str) -> object:
    if name in names:
        return Refusal("GenericError", text)
    names.add(name)
    return {}


def _remove(names: set[str], name: str, error_class: str, text: str) -> object:
    if name not in names:
        return Refusal(error_class, text)
    names.remove(name)
    return {}
