"""Devices of a detached sandbox: whoever attaches or detaches one has the VMM's control connection for that time.

Nothing is kept here between two calls: places and devices are read from the state document when the connection is held, and written
there before it is given back, so any process goes on where another stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from msgspec import structs

from casemate._async.agent import AsyncAgentClient
from casemate._async.devices import AsyncDevices
from casemate._async.hypervisor.qemu_hotplug import AsyncHotplug
from casemate._async.kept import AsyncKept
from casemate._async.qmp import AsyncQmpClient
from casemate._async.transaction import Performer
from casemate._compat import aio as compat
from casemate.agent import messages
from casemate.config.sandbox import TimeoutConfig
from casemate.hypervisor import BlockDevice, NicDevice, PluggedDevice
from casemate.hypervisor.attachments import plugged_of
from casemate.hypervisor.pci import Topology
from casemate.persist.record import SandboxRecord
from casemate.types import Attachment, BlockAttachment, NicAttachment

__all__ = ["AsyncKeptDevices"]

T = TypeVar("T")


class AsyncKeptDevices:
    """The devices of a detached sandbox, as :class:`AsyncDevices` gives them to an owner.

    Args:
        kept: The sandbox.
        agent: Its agent.
        record: Its state document as it was last seen.
        timeouts: How patient to be.
        noted: Called with the state document when it was written.
    """

    __slots__ = ("_agent", "_features", "_kept", "_noted", "_timeouts", "attachments")

    def __init__(
        self,
        kept: AsyncKept,
        agent: AsyncAgentClient,
        record: SandboxRecord,
        timeouts: TimeoutConfig,
        noted: Callable[[SandboxRecord], None],
    ) -> None:
        self._kept = kept
        self._agent = agent
        self._timeouts = timeouts
        self._noted = noted
        self._features: tuple[str, ...] | None = None
        self.attachments: tuple[Attachment, ...] = record.devices

    async def attach_block(
        self, path: str | os.PathLike[str], *, readonly: bool, discard: bool, direct: bool
    ) -> BlockAttachment:
        """See :meth:`AsyncSandbox.attach_block`."""

        async def attach(devices: AsyncDevices) -> BlockAttachment:
            return await devices.attach_block(path, readonly=readonly, discard=discard, direct=direct)

        return await self._use(attach)

    async def attach_nic(self, *, mac: str | None, netns: str | None, owner: int | None) -> NicAttachment:
        """See :meth:`AsyncSandbox.attach_nic`."""

        async def attach(devices: AsyncDevices) -> NicAttachment:
            return await devices.attach_nic(mac=mac, netns=netns, owner=owner)

        return await self._use(attach)

    async def detach(self, device_id: str) -> None:
        """See :meth:`AsyncSandbox.detach`."""

        async def detach(devices: AsyncDevices) -> None:
            await devices.detach(device_id)

        await self._use(detach)

    async def _use(self, work: Callable[[AsyncDevices], compat.Later[T]]) -> T:
        """Do ``work`` on the devices as they are now, while nobody else can change them."""
        features = await self._agents_features()

        async def use(client: AsyncQmpClient) -> T:
            record = await self._kept.read()

            async def write() -> None:
                # As a whole: half of it is no change of anybody's.
                await compat.shielded(self._write(ports.topology, devices.attachments))

            engine = AsyncHotplug(
                record.topology,
                record.machine,
                self._timeouts,
                write,
                plugged=map(plugged_of, record.devices),
            )
            ports = _Ports(engine, client)
            attached = [one.id for one in record.devices]
            devices = AsyncDevices(ports, self._agent, features, write, attached)
            return await work(devices)

        return await self._kept.use_qmp(use)

    async def _write(self, topology: Topology, attachments: tuple[Attachment, ...]) -> None:
        record = await self._kept.update(
            lambda record: structs.replace(record, topology=topology, devices=attachments)
        )
        self.attachments = record.devices
        self._noted(record)

    async def _agents_features(self) -> tuple[str, ...]:
        if self._features is None:
            details = await self._agent.ask(
                "GetGuestDetails", messages.GuestDetailsRequest(), messages.GuestDetailsResponse
            )
            said = details.agent_details
            self._features = () if said is None else said.extra_features
        return self._features


class _Ports:
    """The engine with the connection that is held now."""

    __slots__ = ("_client", "_engine")

    def __init__(self, engine: AsyncHotplug, client: AsyncQmpClient) -> None:
        self._engine = engine
        self._client = client

    @property
    def topology(self) -> Topology:
        return self._engine.topology

    @property
    def plugged(self) -> tuple[PluggedDevice, ...]:
        return self._engine.plugged

    async def attach(self, device: BlockDevice | NicDevice, ask: Performer | None = None) -> PluggedDevice:
        return await self._engine.attach(self._client, device, ask)

    async def detach(self, device_id: str, ask: Performer | None = None) -> None:
        await self._engine.detach(self._client, device_id, ask)
