# Made by scripts/unasync.py from python/casemate/_async/kept_devices.py; do not edit.
"""Devices of a detached sandbox: whoever attaches or detaches one has the VMM's control connection for that time.

Nothing is kept here between two calls: places and devices are read from the state document when the connection is held, and written
there before it is given back, so any process goes on where another stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from msgspec import structs

from casemate._sync.agent import AgentClient
from casemate._sync.devices import Devices
from casemate._sync.hypervisor.qemu_hotplug import Hotplug
from casemate._sync.kept import Kept
from casemate._sync.qmp import QmpClient
from casemate._sync.transaction import Performer
from casemate._compat import blocking as compat
from casemate.agent import messages
from casemate.config.sandbox import TimeoutConfig
from casemate.hypervisor import BlockDevice, NicDevice, PluggedDevice
from casemate.hypervisor.attachments import plugged_of
from casemate.hypervisor.pci import Topology
from casemate.persist.record import SandboxRecord
from casemate.types import Attachment, BlockAttachment, NicAttachment

__all__ = ["KeptDevices"]

T = TypeVar("T")


class KeptDevices:
    """The devices of a detached sandbox, as :class:`Devices` gives them to an owner.

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
        kept: Kept,
        agent: AgentClient,
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

    def attach_block(
        self, path: str | os.PathLike[str], *, readonly: bool, discard: bool, direct: bool
    ) -> BlockAttachment:
        """See :meth:`Sandbox.attach_block`."""

        def attach(devices: Devices) -> BlockAttachment:
            return devices.attach_block(path, readonly=readonly, discard=discard, direct=direct)

        return self._use(attach)

    def attach_nic(self, *, mac: str | None, netns: str | None, owner: int | None) -> NicAttachment:
        """See :meth:`Sandbox.attach_nic`."""

        def attach(devices: Devices) -> NicAttachment:
            return devices.attach_nic(mac=mac, netns=netns, owner=owner)

        return self._use(attach)

    def detach(self, device_id: str) -> None:
        """See :meth:`Sandbox.detach`."""

        def detach(devices: Devices) -> None:
            devices.detach(device_id)

        self._use(detach)

    def _use(self, work: Callable[[Devices], compat.Later[T]]) -> T:
        """Do ``work`` on the devices as they are now, while nobody else can change them."""
        features = self._agents_features()

        def use(client: QmpClient) -> T:
            record = self._kept.read()

            def write() -> None:
                # As a whole: half of it is no change of anybody's.
                compat.shielded(self._write(ports.topology, devices.attachments))

            engine = Hotplug(
                record.topology,
                record.machine,
                self._timeouts,
                write,
                plugged=map(plugged_of, record.devices),
            )
            ports = _Ports(engine, client)
            attached = [one.id for one in record.devices]
            devices = Devices(ports, self._agent, features, write, attached)
            return work(devices)

        return self._kept.use_qmp(use)

    def _write(self, topology: Topology, attachments: tuple[Attachment, ...]) -> None:
        record = self._kept.update(
            lambda record: structs.replace(record, topology=topology, devices=attachments)
        )
        self.attachments = record.devices
        self._noted(record)

    def _agents_features(self) -> tuple[str, ...]:
        if self._features is None:
            details = self._agent.ask(
                "GetGuestDetails", messages.GuestDetailsRequest(), messages.GuestDetailsResponse
            )
            said = details.agent_details
            self._features = () if said is None else said.extra_features
        return self._features


class _Ports:
    """The engine with the connection that is held now."""

    __slots__ = ("_client", "_engine")

    def __init__(self, engine: Hotplug, client: QmpClient) -> None:
        self._engine = engine
        self._client = client

    @property
    def topology(self) -> Topology:
        return self._engine.topology

    @property
    def plugged(self) -> tuple[PluggedDevice, ...]:
        return self._engine.plugged

    def attach(self, device: BlockDevice | NicDevice, ask: Performer | None = None) -> PluggedDevice:
        return self._engine.attach(self._client, device, ask)

    def detach(self, device_id: str, ask: Performer | None = None) -> None:
        self._engine.detach(self._client, device_id, ask)
