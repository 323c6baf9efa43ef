"""Devices that come and go on a running QEMU: which place each has, and one change at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import structs

from casemate import _core
from casemate._async.qmp import AsyncQmpClient
from casemate._async.transaction import AsyncTransaction, Performer
from casemate._compat import aio as compat
from casemate.agent.messages import AwaitDeviceResponse
from casemate.config.sandbox import TimeoutConfig
from casemate.errors import (
    AlreadyExistsError,
    HostError,
    HypervisorError,
    NotFoundError,
    QmpError,
    ResourceExhaustedError,
    UnsupportedError,
)
from casemate.hypervisor import BlockDevice, NicDevice, PluggedDevice
from casemate.hypervisor.pci import Place, Topology
from casemate.hypervisor.qemu import hotplug
from casemate.observe.log import Log
from casemate.transaction import Action, GuestCall, NativeCall, PlanState, QmpCall

__all__ = ["AsyncHotplug"]

_log = Log(__name__)


class AsyncHotplug:
    """The later devices of one VM.

    Args:
        topology: The bridges and what is behind them.
        machine: For the text of errors.
        timeouts: How patient to be.
        changed: Called when a place was taken, before anything is made, when one was given back, and when a device that
            could not be taken away has another name in the guest.
        natives: What is done on the host, by name; None: as it is done.
        plugged: What was plugged in before, by whoever had the VM until now.

    Attributes:
        topology: As it is now.
    """

    __slots__ = ("_changed", "_lock", "_machine", "_natives", "_plugged", "_timeouts", "topology")

    def __init__(
        self,
        topology: Topology,
        machine: str,
        timeouts: TimeoutConfig,
        changed: Callable[[], compat.Later[None]],
        natives: Mapping[str, Callable[..., Any]] | None = None,
        plugged: Iterable[PluggedDevice] = (),
    ) -> None:
        self.topology = topology
        self._machine = machine
        self._timeouts = timeouts
        self._changed = changed
        self._natives = _NATIVES if natives is None else natives
        places = topology.places()
        self._plugged = {one.device.id: one for one in plugged if one.device.id in places}
        self._lock = compat.Lock()

    @property
    def plugged(self) -> tuple[PluggedDevice, ...]:
        """What is plugged in, in the order of its coming; also what a failed attempt could not take back."""
        return tuple(self._plugged.values())

    async def attach(
        self, client: AsyncQmpClient, device: BlockDevice | NicDevice, ask: Performer | None
    ) -> PluggedDevice:
        """Plug ``device`` in. A failure leaves nothing behind, or says what.

        Args:
            ask: Asks the guest whether it has the device; None: that is left to the caller.
        """
        hotplug.check_device(device)
        async with self._lock:
            place = self._take_place(device)
            plan = hotplug.plan_attach(device, place, self._timeouts, check=ask is not None)
            transaction = AsyncTransaction(plan, self._performers(client, ask))
            plugged = PluggedDevice(device=device, pci_path=place.path)
            try:
                await self._changed()
                results = await transaction.run()
            except BaseException:
                if transaction.state is PlanState.BROKEN:
                    # It keeps its place: what is there is not known. Detaching it goes on with it.
                    self._plugged[device.id] = plugged
                else:
                    await self._give_back(device.id)
                raise
            tap, answer = results.get("tap.create"), results.get("guest.there")
            plugged = PluggedDevice(
                device=device,
                pci_path=place.path,
                host_name="" if tap is None else tap.name,
                guest_name=None if answer is None else answer.name,
                guest_mac="" if answer is None else answer.hardware_address,
            )
            self._plugged[device.id] = plugged
            return plugged

    async def detach(self, client: AsyncQmpClient, device_id: str, ask: Performer | None) -> None:
        """Take a device away; its place is free when the guest has let it go. After a failure it is still plugged in.

        Args:
            ask: As for :meth:`attach`.
        """
        async with self._lock:
            plugged = self._plugged.get(device_id)
            if plugged is None:
                names = ", ".join(sorted(self._plugged)) or "none"
                raise NotFoundError(f"no device {device_id!r} was attached; there are: {names}")
            place = self.topology.places()[device_id]
            plan = hotplug.plan_detach(plugged.device, place, self._timeouts, check=ask is not None)
            transaction = AsyncTransaction(plan, self._performers(client, ask))
            try:
                await transaction.run()
            except BaseException:
                # Plugged in again, the guest may call it something else.
                answer = transaction.results.get("qemu.device_del.undo")
                if isinstance(answer, AwaitDeviceResponse) and answer.name != plugged.guest_name:
                    self._plugged[device_id] = structs.replace(plugged, guest_name=answer.name)
                    await self._tell_after_failure(device_id)
                raise
            del self._plugged[device_id]
            self.topology = self.topology.release(device_id)
            await self._changed()

    def _performers(self, client: AsyncQmpClient, ask: Performer | None) -> Mapping[type[Action], Performer]:
        async def command(call: QmpCall, results: Mapping[str, Any], limit_s: float) -> Any:
            return await _execute(client, call, results, limit_s)

        async def native(call: NativeCall, results: Mapping[str, Any], limit_s: float) -> Any:
            # Directly, also on an event loop: each is a short system call or two.
            return self._natives[call.function](results.get(call.result_of), **call.arguments)

        performers: dict[type[Action], Performer] = {QmpCall: command, NativeCall: native}
        if ask is not None:
            performers[GuestCall] = ask
        return performers

    def _take_place(self, device: BlockDevice | NicDevice) -> Place:
        if device.id in self.topology.places():
            raise AlreadyExistsError(f"a device {device.id!r} is attached already")
        if not self.topology.capacity:
            raise UnsupportedError(
                f"this {self._machine} has no root ports for later devices: use machine 'q35' with hotplug_ports",
                capability="hotplug",
            )
        if not self.topology.free_count:
            raise ResourceExhaustedError(
                f"all {self.topology.capacity} places are taken: raise hotplug_ports or hotplug_bridges"
            )
        self.topology, place = self.topology.allocate(device.id)
        return place

    async def _give_back(self, device_id: str) -> None:
        self.topology = self.topology.release(device_id)
        await self._tell_after_failure(device_id)

    async def _tell_after_failure(self, device_id: str) -> None:
        try:
            await self._changed()
        except HostError as error:
            # What failed first is what the caller is told; the next change writes this one too.
            _log.warning("state not written", extra={"op": "hotplug", "target": device_id}, exc_info=error)


class _Tap:
    """A tap device's descriptor and name."""

    __slots__ = ("fd", "name")

    def __init__(self, take_fd: int, name: str) -> None:
        self.fd = take_fd
        self.name = name

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _create_tap(_: Any, *, name: str, netns: str | None, owner: int | None) -> _Tap:
    if netns is None:
        return _Tap(*_core.create_tap(name, owner=owner))
    try:
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"the network namespace {netns} can't be opened: {error.strerror}",
            errno=error.errno or 0,
            target=netns,
            op="tap.create",
        ) from error
    try:
        return _Tap(*_core.create_tap(name, borrow_netns_fd=fd, owner=owner))
    finally:
        os.close(fd)


def _close_tap(tap: _Tap | None) -> None:
    if tap is not None:
        tap.close()


_NATIVES: Mapping[str, Callable[..., Any]] = {"tap.create": _create_tap, "tap.close": _close_tap}


async def _execute(client: AsyncQmpClient, call: QmpCall, results: Mapping[str, Any], limit_s: float) -> Any:
    fds = [results[call.fd_of].fd] if call.fd_of else []
    if call.awaits is None:
        value, _ = await _ask_qemu(client, call, limit_s, fds)
        return value
    # Awaited from before the command is sent: the event may overtake the answer.
    deadline = time.monotonic() + limit_s
    gone = client.expect(call.awaits.name, call.awaits.refused, match=call.awaits.match)
    try:
        _, done_already = await _ask_qemu(client, call, limit_s, fds)
        if done_already:
            return None
        event = await gone.wait(max(deadline - time.monotonic(), 0.001))
    finally:
        gone.cancel()
    if event.name == call.awaits.refused:
        raise HypervisorError(
            f"the guest refused to let {call.awaits.match.get('device')!r} go", op=f"qemu.{call.command}"
        )
    return event.data


async def _ask_qemu(
    client: AsyncQmpClient, call: QmpCall, limit_s: float, borrow_fds: list[int]
) -> tuple[Any, bool]:
    """The answer, and whether there was nothing to do."""
    try:
        return await client.execute(
            call.command, call.arguments, timeout_s=limit_s, borrow_fds=borrow_fds
        ), False
    except QmpError as error:
        text = str(error)
        if call.done_already is not None and call.done_already.covers(error.error_class, text):
            return None, True
        if call.under_way is None or not call.under_way.covers(error.error_class, text):
            raise
        _log.debug("goes on", extra={"op": f"qemu.{call.command}", "target": str(call.arguments)})
        return None, False
