# Made by scripts/unasync.py from python/casemate/_async/hypervisor/qemu_hotplug.py; do not edit.
"""Disks that come and go on a running QEMU, each behind a root port of its own."""

from __future__ import annotations

import logging

from casemate._sync.qmp import QmpClient
from casemate._compat import blocking as compat
from casemate.config.sandbox import TimeoutConfig
from casemate.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    HypervisorError,
    NotFoundError,
    QmpError,
    ResourceExhaustedError,
    UnsupportedError,
    VmmExitedError,
)
from casemate.hypervisor import BlockAddress, BlockDevice
from casemate.hypervisor.qemu import plan as planning
from casemate.observe import failpoints

__all__ = ["BlockHotplug"]

_log = logging.getLogger(__name__)

_PENDING = "already in the process of unplug"
_NO_DEVICE = "DeviceNotFound"
_NO_NODE = "Failed to find node"


class BlockHotplug:
    """Which disk is behind which root port.

    Args:
        ports: Names of the root ports.
        machine: For the text of errors.
        timeouts: How patient to be.
    """

    __slots__ = ("_disks", "_lock", "_machine", "_ports", "_timeouts")

    def __init__(self, ports: tuple[str, ...], machine: str, timeouts: TimeoutConfig) -> None:
        self._ports = ports
        self._machine = machine
        self._timeouts = timeouts
        self._disks: dict[str, tuple[str, BlockDevice]] = {}
        self._lock = compat.Lock()

    @property
    def free_ports(self) -> tuple[str, ...]:
        """Ports with nothing behind them."""
        taken = {port for port, _ in self._disks.values()}
        return tuple(port for port in self._ports if port not in taken)

    def attach(self, client: QmpClient, disk: BlockDevice) -> BlockAddress:
        """Plug ``disk`` in. A failure leaves nothing behind."""
        with self._lock:
            port = self._choose_port(disk)
            device = planning.hotplug_device(disk, port)
            properties = planning.block_node(disk).properties()
            limit_s = self._timeouts.control_s
            self._disks[disk.id] = (port, disk)
            asked = ""
            try:
                failpoints.hit("qemu.blockdev_add")
                asked = "node"
                client.execute("blockdev-add", properties, timeout_s=limit_s)
                failpoints.hit("qemu.device_add")
                asked = "device"
                client.execute(
                    "device_add", {"driver": device.driver, **device.properties()}, timeout_s=limit_s
                )
                failpoints.hit("qemu.device_added")
            except BaseException as error:
                # What QEMU refused may be another's of the same name, and stays.
                refused = isinstance(error, QmpError)
                has_device = asked == "device" and not refused
                has_node = asked == "device" or (asked == "node" and not refused)
                compat.shielded(self._take_back(client, disk, error, device=has_device, node=has_node))
                raise
            return planning.address_of(disk, port)

    def _take_back(
        self, client: QmpClient, disk: BlockDevice, error: BaseException, *, device: bool, node: bool
    ) -> None:
        """Undo what an attach may have made: after a deadline or a cancellation QEMU may have carried it out."""
        try:
            if device:
                self._unplug(client, disk)
            if node:
                self._delete_node(client, disk)
        except VmmExitedError:
            pass  # and the disk with it
        except (HypervisorError, DeadlineExceededError) as second:
            # It keeps its port: what is behind it is not known.
            error.add_note(f"and the disk {disk.id!r} may still be attached: {second}")
            return
        del self._disks[disk.id]

    def detach(self, client: QmpClient, disk_id: str) -> None:
        """Unplug the disk; its port is free only when the guest has let it go."""
        with self._lock:
            if disk_id not in self._disks:
                names = ", ".join(sorted(self._disks)) or "none"
                raise NotFoundError(f"no disk {disk_id!r} was attached; there are: {names}")
            _, disk = self._disks[disk_id]
            failpoints.hit("qemu.device_del")
            self._unplug(client, disk)
            failpoints.hit("qemu.blockdev_del")
            self._delete_node(client, disk)
            del self._disks[disk_id]

    def _unplug(self, client: QmpClient, disk: BlockDevice) -> None:
        device_id = f"virtio-{disk.id}"
        # DEVICE_DELETED comes for the device's inner parts too: those have no id.
        gone = client.expect("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", match={"device": device_id})
        try:
            if not self._ask_guest(client, device_id):
                return
            event = gone.wait(self._timeouts.hotplug_s)
        finally:
            gone.cancel()
        if event.name != "DEVICE_DELETED":
            raise HypervisorError(f"the guest refused to let the disk {disk.id!r} go", op="qemu.detach_block")

    def _delete_node(self, client: QmpClient, disk: BlockDevice) -> None:
        node = planning.block_node(disk).name
        try:
            client.execute("blockdev-del", {"node-name": node}, timeout_s=self._timeouts.control_s)
        except QmpError as error:
            if _NO_NODE not in str(error):
                raise

    def _ask_guest(self, client: QmpClient, device_id: str) -> bool:
        """Ask it to let the device go; False when there is none: an earlier detach came as far as this."""
        try:
            client.execute("device_del", {"id": device_id}, timeout_s=self._timeouts.control_s)
        except QmpError as error:
            if error.error_class == _NO_DEVICE:
                return False
            # An earlier wish, given up at its deadline, still stands: its event serves us too.
            if _PENDING not in str(error):
                raise
            _log.debug("unplug goes on", extra={"op": "qemu.detach_block", "target": device_id})
        return True

    def _choose_port(self, disk: BlockDevice) -> str:
        planning.check_disk(disk)
        if disk.id in self._disks:
            raise AlreadyExistsError(f"a disk {disk.id!r} is attached already")
        if not self._ports:
            raise UnsupportedError(
                f"this {self._machine} has no root ports for later disks: use machine 'q35' with hotplug_ports",
                capability="block_hotplug",
            )
        if not self.free_ports:
            raise ResourceExhaustedError(f"all {len(self._ports)} root ports are taken: raise hotplug_ports")
        return self.free_ports[0]
