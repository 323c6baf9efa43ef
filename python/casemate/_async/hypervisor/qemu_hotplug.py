"""Disks that come and go on a running QEMU, each behind a root port of its own."""

from __future__ import annotations

import logging

from casemate._async.qmp import AsyncQmpClient
from casemate._compat import aio as compat
from casemate.config.sandbox import TimeoutConfig
from casemate.errors import (
    AlreadyExistsError,
    HypervisorError,
    NotFoundError,
    QmpError,
    ResourceExhaustedError,
    UnsupportedError,
)
from casemate.hypervisor import BlockAddress, BlockDevice
from casemate.hypervisor.qemu import plan as planning

__all__ = ["AsyncBlockHotplug"]

_log = logging.getLogger(__name__)

_PENDING = "already in the process of unplug"


class AsyncBlockHotplug:
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

    async def attach(self, client: AsyncQmpClient, disk: BlockDevice) -> BlockAddress:
        """Plug ``disk`` in. A failure leaves nothing behind."""
        async with self._lock:
            port = self._choose_port(disk)
            device = planning.hotplug_device(disk, port)
            node = planning.block_node(disk)
            limit_s = self._timeouts.control_s
            await client.execute("blockdev-add", node.properties(), timeout_s=limit_s)
            # Taken before the device is there: after a deadline or a cancellation it may be.
            self._disks[disk.id] = (port, disk)
            try:
                await client.execute(
                    "device_add", {"driver": device.driver, **device.properties()}, timeout_s=limit_s
                )
            except QmpError as error:
                del self._disks[disk.id]
                try:
                    await client.execute("blockdev-del", {"node-name": node.name}, timeout_s=limit_s)
                except HypervisorError as second:
                    error.add_note(f"and the block node {node.name} is left behind: {second}")
                raise
            return planning.address_of(disk, port)

    async def detach(self, client: AsyncQmpClient, disk_id: str) -> None:
        """Unplug the disk; its port is free only when the guest has let it go."""
        async with self._lock:
            if disk_id not in self._disks:
                names = ", ".join(sorted(self._disks)) or "none"
                raise NotFoundError(f"no disk {disk_id!r} was attached; there are: {names}")
            _, disk = self._disks[disk_id]
            device_id = f"virtio-{disk_id}"
            # DEVICE_DELETED comes for the device's inner parts too: those have no id.
            gone = client.expect("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", match={"device": device_id})
            try:
                await self._ask_guest(client, device_id)
                event = await gone.wait(self._timeouts.hotplug_s)
            finally:
                gone.cancel()
            if event.name != "DEVICE_DELETED":
                raise HypervisorError(
                    f"the guest refused to let the disk {disk_id!r} go", op="qemu.detach_block"
                )
            node = planning.block_node(disk).name
            await client.execute("blockdev-del", {"node-name": node}, timeout_s=self._timeouts.control_s)
            del self._disks[disk_id]

    async def _ask_guest(self, client: AsyncQmpClient, device_id: str) -> None:
        try:
            await client.execute("device_del", {"id": device_id}, timeout_s=self._timeouts.control_s)
        except QmpError as error:
            # An earlier wish, given up at its deadline, still stands: its event serves us too.
            if _PENDING not in str(error):
                raise
            _log.debug("unplug goes on", extra={"op": "qemu.detach_block", "target": device_id})

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
