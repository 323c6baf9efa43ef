# Made by scripts/unasync.py from python/casemate/_async/devices.py; do not edit.
"""Disks and network interfaces that come and go while a sandbox runs, as its user sees them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from casemate._sync.agent import DEVICE_SERVICE, AgentClient
from casemate._sync.transaction import Performer
from casemate._sync.undo import UndoStack, raise_with
from casemate._compat import blocking as compat
from casemate.agent import messages
from casemate.errors import (
    AgentRpcError,
    DeadlineExceededError,
    HostError,
    InvalidConfigError,
    NotFoundError,
    VmmExitedError,
)
from casemate.hypervisor import BlockDevice, NicDevice, PluggedDevice
from casemate.hypervisor.attachments import attachment_of
from casemate.hypervisor.index import lowest_free
from casemate.hypervisor.pci import Topology
from casemate.transaction import GuestCall
from casemate.types import Attachment, BlockAttachment, NicAttachment

__all__ = ["Devices", "Ports"]

FEATURE = "casemate.await_device"
"""An agent with it can say whether the guest has a device."""
_ANSWER_S = 5.0
"""How much longer than the guest's own wait an answer may take."""
_DEADLINE_EXCEEDED = 4


class Ports(Protocol):
    """A VMM, as far as devices come and go: a driver is one."""

    @property
    def topology(self) -> Topology:
        """The places, and what has them."""

    @property
    def plugged(self) -> tuple[PluggedDevice, ...]:
        """What is plugged in."""

    def attach(self, device: BlockDevice | NicDevice, ask: Performer | None = None) -> PluggedDevice:
        """Plug in a device."""

    def detach(self, device_id: str, ask: Performer | None = None) -> None:
        """Take a device away."""


class Devices:
    """The devices that were attached to one running sandbox.

    Args:
        driver: Its VMM, as far as devices come and go.
        agent: Its agent.
        features: What the agent announces.
        changed: Called when :attr:`attachments` has one more; the driver tells of the others.
        attached: Names of what is attached already.
    """

    __slots__ = ("_agent", "_ask", "_attached", "_changed", "_driver", "_lock")

    def __init__(
        self,
        driver: Ports,
        agent: AgentClient,
        features: tuple[str, ...],
        changed: Callable[[], compat.Later[None]],
        attached: Iterable[str] = (),
    ) -> None:
        self._driver = driver
        self._agent = agent
        self._ask: Performer | None = self._await_device if FEATURE in features else None
        self._changed = changed
        self._attached = set(attached)
        self._lock = compat.Lock()

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """What is attached, in the order of its coming."""
        plugged = (one for one in self._driver.plugged if one.device.id in self._attached)
        return tuple(map(attachment_of, plugged))

    def attach_block(
        self, path: str | os.PathLike[str], *, readonly: bool, discard: bool, direct: bool
    ) -> BlockAttachment:
        """See :meth:`Sandbox.attach_block`."""
        text, is_device = _check_file(Path(path), readonly=readonly)
        with self._lock:
            name = lowest_free(self._driver.topology.places(), "disk")
            disk = BlockDevice(
                id=name,
                path=text,
                read_only=readonly,
                host_device=is_device,
                discard=discard and not readonly,
                direct=direct,
                serial=name,
            )
            plugged = self._driver.attach(disk, self._ask)
            self._keep(name)
            return cast("BlockAttachment", attachment_of(plugged))

    def attach_nic(self, *, mac: str | None, netns: str | None, owner: int | None) -> NicAttachment:
        """See :meth:`Sandbox.attach_nic`."""
        with self._lock:
            name = lowest_free(self._driver.topology.places(), "nic")
            nic = NicDevice(id=name, mac=_random_mac() if mac is None else mac, netns=netns, owner=owner)
            plugged = self._driver.attach(nic, self._ask)
            self._keep(name)
            return cast("NicAttachment", attachment_of(plugged))

    def detach(self, device_id: str) -> None:
        """See :meth:`Sandbox.detach`."""
        with self._lock:
            if not self._is_plugged(device_id):
                names = ", ".join(one.id for one in self.attachments) or "none"
                raise NotFoundError(f"no device {device_id!r} is attached; there are: {names}")
            try:
                self._driver.detach(device_id, self._ask)
            finally:
                if not self._is_plugged(device_id):
                    self._attached.discard(device_id)

    def _is_plugged(self, device_id: str) -> bool:
        return any(one.device.id == device_id for one in self._driver.plugged)

    def _keep(self, device_id: str) -> None:
        """Write it down; what can't be written down is not kept."""
        self._attached.add(device_id)
        try:
            self._changed()
        except BaseException as error:
            self._attached.discard(device_id)

            def take_away() -> None:
                try:
                    self._driver.detach(device_id, self._ask)
                except VmmExitedError:
                    pass  # and the device with it

            undo = UndoStack()
            undo.push(f"attached {device_id}", take_away)
            cause = raise_with(error, undo.unwind())
            if cause is error:
                raise
            raise cause from error

    def _await_device(
        self, call: GuestCall, results: Mapping[str, Any], limit_s: float
    ) -> messages.AwaitDeviceResponse:
        request = messages.AwaitDeviceRequest(**call.arguments, timeout_ms=int(limit_s * 1000))
        pending = self._agent.submit(
            call.method, request, timeout_s=limit_s + _ANSWER_S, service=DEVICE_SERVICE
        )
        try:
            return messages.decode(pending.result(), messages.AwaitDeviceResponse)
        except AgentRpcError as error:
            if error.code != _DEADLINE_EXCEEDED:
                raise
            raise DeadlineExceededError(
                f"the guest did not see it in time: {error.details}",
                deadline_s=limit_s,
                waited_s=limit_s,
                op="guest.await_device",
            ) from error


def _check_file(given: Path, *, readonly: bool) -> tuple[str, bool]:
    """The whole path, and whether a block device is there. Raises: NotFoundError, InvalidConfigError, HostError."""
    path = str(given.absolute())
    try:
        found = os.stat(path)
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path!r} to attach") from error
    except IsADirectoryError as error:
        raise InvalidConfigError(
            f"{path!r} is a directory, a file or block device is expected", path="path"
        ) from error
    except OSError as error:
        wanted = "read" if readonly else "read and written; attach it with readonly=True if that is enough"
        raise HostError(
            f"{path!r} can't be {wanted}: {error.strerror}",
            errno=error.errno or 0,
            target=path,
            op="sandbox.attach_block",
        ) from error
    os.close(fd)
    is_device = stat.S_ISBLK(found.st_mode)
    if not is_device and not stat.S_ISREG(found.st_mode):
        raise InvalidConfigError(f"{path!r} is neither a regular file nor a block device", path="path")
    if not is_device and not found.st_size:
        raise InvalidConfigError(f"{path!r} is empty, a disk has at least 512 bytes", path="path")
    return path, is_device


def _random_mac() -> str:
    """An address of our own making: locally administered, of one interface."""
    octets = bytearray(os.urandom(6))
    octets[0] = octets[0] & 0xFC | 0x02
    return octets.hex(":")
