"""The state document of a sandbox. What outlives a crash is written here before it is made."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from casemate.agent.messages import ProcessSpec
from casemate.hypervisor.pci import Topology
from casemate.types import Attachment, State

__all__ = ["VERSION", "ContainerRecord", "ProcessRecord", "SandboxRecord", "with_container"]

VERSION = 3


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A process of the host, told apart from a later one with the same number by its start time.

    Args:
        pid: Process id.
        start_time_ticks: Field 22 of ``/proc/<pid>/stat``.
    """

    pid: int
    start_time_ticks: int


class ContainerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A container: its image, its first process as the agent was told of it, and its state."""

    id: str
    image: str
    image_digest: str
    process: ProcessSpec
    state: State
    created_unix_ns: int
    exit_code: int | None = None


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sandbox as others see it.

    Args:
        version: Of this document; a reader refuses a newer one.
        config: The configuration as a document.
        owner: The process that holds it and with which it ends: its maker, or its keeper once it is made.
        keeper: Of a detached sandbox the process that holds it while nobody else does; None: it is its maker's.
        vmm: The VMM, absent until it was started.
        agent_url: The agent's address, empty until the VMM was prepared.
        topology: The bridges for later devices, and what is behind them or is about to be.
        devices: What was attached to the running VM.
    """

    version: int = VERSION
    id: str
    state: State
    created_unix_ns: int
    owner: ProcessRecord
    hypervisor: str
    machine: str
    accel: str
    accel_reason: str
    vcpus: int
    memory_mib: int
    kernel: str
    kernel_release: str
    initrd: str | None
    keeper: ProcessRecord | None = None
    vmm: ProcessRecord | None = None
    agent_url: str = ""
    containers: tuple[ContainerRecord, ...] = ()
    topology: Topology = Topology()
    devices: tuple[Attachment, ...] = ()


def with_container(
    record: SandboxRecord, container_id: str, container: ContainerRecord | None
) -> SandboxRecord:
    """``record`` with one container as it is now; None: without it. The others, and the order, stay. Does not block."""
    known = [one.id for one in record.containers]
    containers = [one for one in record.containers if one.id != container_id]
    if container is not None:
        containers.insert(known.index(container_id) if container_id in known else len(known), container)
    return replace(record, containers=tuple(containers))
