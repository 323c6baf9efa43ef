"""The machine that a command line describes, and the QMP commands that look at it and change it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Machine", "QmpRefusal", "options"]

_SLOTS = {"pcie.0": ""}
_DRIVERS = (
    "virtio-blk-pci",
    "virtio-blk-device",
    "virtio-net-pci",
    "virtio-rng-pci",
    "virtio-rng-device",
    "pcie-root-port",
    "pci-bridge",
    "pcie-pci-bridge",
    "vhost-user-vsock-pci",
    "vhost-user-vsock-device",
    "vhost-vsock-pci",
    "vhost-vsock-device",
)


class QmpRefusal(Exception):
    """QEMU's error: its class, and the text."""

    def __init__(self, text: str, error_class: str = "GenericError") -> None:
        super().__init__(text)
        self.error_class = error_class


def options(text: str) -> dict[str, str]:
    """``a,b=c`` as QEMU reads it: a doubled comma is one in a value. The first word without a name is called ``driver``."""
    parts = text.replace(",,", "\0").split(",")
    pairs = (part.replace("\0", ",").partition("=") for part in parts)
    return {(name if equals else "driver"): (value if equals else name) for name, equals, value in pairs}


class Machine:
    """Devices, block nodes, and whether the vCPUs run.

    Args:
        arguments: QEMU's command line, the program left out.
        tell: Sends an event, given its name and data.
        quit: Ends the VMM.
    """

    def __init__(
        self, arguments: list[str], *, tell: Callable[[str, dict[str, Any]], None], quit: Callable[[], None]
    ) -> None:
        self.devices: dict[str, dict[str, str]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.netdevs: dict[str, dict[str, Any]] = {}
        self.fds: set[str] = set()
        self.paused = "-S" in arguments
        self._name = self._uuid = ""
        self._vcpus = 1
        self._tell = tell
        self._quit = quit
        for option, value in itertools.pairwise(arguments):
            if option == "-device":
                self._add_device(options(value))
            elif option == "-blockdev":
                node = options(value)
                self.nodes[node["node-name"]] = node
            elif option == "-name":
                self._name = options(value)["driver"]
            elif option == "-uuid":
                self._uuid = value
            elif option == "-smp":
                self._vcpus = int(options(value)["cpus"])

    def has_disk(self, source: str) -> bool:
        """Whether the guest finds a disk by its PCI path or ``serial=…``."""
        if source.startswith("serial="):
            return any(f"serial={device.get('serial')}" == source for device in self._disks())
        return any(self._pci_path(device) == source for device in self._disks())

    def name_of(self, subsystem: str, pci_path: str) -> str:
        """What the guest calls the device at an address; empty when it has none there."""
        driver, name = {"block": ("virtio-blk", "vd"), "net": ("virtio-net", "eth")}[subsystem]
        found = [device for device in self.devices.values() if device["driver"].startswith(driver)]
        places = [self._pci_path(device) for device in found]
        if pci_path not in places:
            return ""
        number = places.index(pci_path)
        return f"{name}{chr(ord('a') + number)}" if subsystem == "block" else f"{name}{number}"

    def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Run a QMP command. Raises: QmpRefusal."""
        run = getattr(self, f"_qmp_{command.replace('-', '_')}", None)
        if run is None:
            raise QmpRefusal(f"The command {command} has not been found", "CommandNotFound")
        return run(**{name.replace("-", "_"): value for name, value in arguments.items()})

    def _disks(self) -> list[dict[str, str]]:
        return [device for device in self.devices.values() if device["driver"].startswith("virtio-blk")]

    def _pci_path(self, device: Mapping[str, str]) -> str:
        slot = f"{int(device.get('addr', '0'), 0):02x}"
        bus = self.devices.get(device.get("bus", ""))
        return slot if bus is None else f"{self._pci_path(bus)}/{slot}"

    def _add_device(self, device: dict[str, str]) -> None:
        driver, name = device["driver"], device.get("id", "")
        if driver not in _DRIVERS:
            raise QmpRefusal(f"'{driver}' is not a valid device model name")
        if name in self.devices:
            raise QmpRefusal(f"Duplicate device ID '{name}'")
        bus = device.get("bus", "")
        if bus not in ("", "pcie.0") and bus not in self.devices:
            raise QmpRefusal(f"Bus '{bus}' not found")
        places = {(other.get("bus"), other.get("addr")) for other in self.devices.values() if "bus" in other}
        if bus and (bus, device.get("addr")) in places:
            raise QmpRefusal(f"PCI: slot {device.get('addr')} function 0 already occupied, in use by another")
        drive = device.get("drive")
        if drive is not None:
            if drive not in self.nodes:
                raise QmpRefusal(f"Property '{driver}.drive' can't find value '{drive}'")
            if any(other.get("drive") == drive for other in self.devices.values()):
                raise QmpRefusal(f"Drive '{drive}' is already in use by another block device")
        self.devices[name] = device

    def _qmp_query_status(self) -> dict[str, Any]:
        status = "paused" if self.paused else "running"
        return {"status": status, "running": not self.paused, "singlestep": False}

    def _qmp_stop(self) -> dict[str, Any]:
        self.paused = True
        self._tell("STOP", {})
        return {}

    def _qmp_cont(self) -> dict[str, Any]:
        self.paused = False
        self._tell("RESUME", {})
        return {}

    def _qmp_quit(self) -> dict[str, Any]:
        self._tell("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._quit()
        return {}

    def _qmp_query_name(self) -> dict[str, Any]:
        return {"name": self._name}

    def _qmp_query_uuid(self) -> dict[str, Any]:
        return {"UUID": self._uuid}

    def _qmp_query_cpus_fast(self) -> list[dict[str, Any]]:
        return [{"cpu-index": index, "thread-id": os.getpid()} for index in range(self._vcpus)]

    def _qmp_query_block(self) -> list[dict[str, Any]]:
        return [
            {
                "qdev": device["id"],
                "inserted": {
                    "ro": node["read-only"] in (True, "on"),
                    "file": node["file"]["filename"] if "file" in node else node["file.filename"],
                    "node-name": node["node-name"],
                },
            }
            for device in self._disks()
            for node in [self.nodes[device["drive"]]]
        ]

    def _qmp_query_named_block_nodes(self, flat: bool = False) -> list[dict[str, Any]]:
        return [{"node-name": name} for name in self.nodes]

    def _qmp_query_pci(self) -> list[dict[str, Any]]:
        devices = [
            {"qdev_id": name, "slot": int(device["addr"], 0), "bus": 0}
            for name, device in self.devices.items()
            if "addr" in device
        ]
        return [{"bus": 0, "devices": devices}]

    def _qmp_blockdev_add(self, **node: Any) -> dict[str, Any]:
        name, file = node["node_name"], node["file"]["filename"]
        if name in self.nodes:
            raise QmpRefusal(f"Duplicate nodes with node-name='{name}'")
        if not os.access(file, os.R_OK):
            raise QmpRefusal(f"Could not open '{file}': No such file or directory")
        self.nodes[name] = {key.replace("_", "-"): value for key, value in node.items()}
        return {}

    def _qmp_blockdev_del(self, node_name: str) -> dict[str, Any]:
        if node_name not in self.nodes:
            raise QmpRefusal(f"Failed to find node with node-name='{node_name}'")
        if any(device.get("drive") == node_name for device in self.devices.values()):
            raise QmpRefusal(f"Node {node_name} is in use")
        del self.nodes[node_name]
        return {}

    def _qmp_netdev_add(self, id: str, **properties: Any) -> dict[str, Any]:
        if id in self.netdevs:
            raise QmpRefusal(f"Duplicate ID '{id}' for netdev")
        if properties.get("fd") not in (None, *self.fds):
            raise QmpRefusal(f"No file descriptor supplied via SCM_RIGHTS or named '{properties['fd']}'")
        self.fds.discard(properties.get("fd", ""))
        self.netdevs[id] = properties
        return {}

    def _qmp_getfd(self, fdname: str) -> dict[str, Any]:
        self.fds.add(fdname)
        return {}

    def _qmp_closefd(self, fdname: str) -> dict[str, Any]:
        if fdname not in self.fds:
            raise QmpRefusal(f"File descriptor named '{fdname}' not found")
        self.fds.discard(fdname)
        return {}

    def _qmp_netdev_del(self, id: str) -> dict[str, Any]:
        if self.netdevs.pop(id, None) is None:
            raise QmpRefusal(f"Device '{id}' not found", "DeviceNotFound")
        return {}

    def _qmp_device_add(self, **device: Any) -> dict[str, Any]:
        self._add_device({key: str(value) for key, value in device.items()})
        return {}

    def _qmp_device_del(self, id: str) -> dict[str, Any]:
        if id not in self.devices:
            raise QmpRefusal(f"Device '{id}' not found", "DeviceNotFound")
        del self.devices[id]
        # QEMU tells of the inner device too, which has a path and no name.
        self._tell("DEVICE_DELETED", {"path": f"/machine/peripheral/{id}/virtio-backend"})
        self._tell("DEVICE_DELETED", {"device": id, "path": f"/machine/peripheral/{id}"})
        return {}
