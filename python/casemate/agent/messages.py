"""Requests to the guest agent, and its answers, as documents with the protocol's own field names.

Only what casemate sends or reads is here; the whole protocol is in ``rust/casemate-proto``.
Source: spec ``agent-protocol.md`` parts 2.2, 2.3 and 2.5.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

__all__ = [
    "AgentDetails",
    "AwaitDeviceRequest",
    "AwaitDeviceResponse",
    "CloseStdinRequest",
    "ContainerRequest",
    "CreateContainerRequest",
    "CreateSandboxRequest",
    "DestroySandboxRequest",
    "ExecProcessRequest",
    "GuestDetailsRequest",
    "GuestDetailsResponse",
    "LinuxCapabilities",
    "LinuxDeviceCgroup",
    "LinuxNamespace",
    "LinuxSpec",
    "Mount",
    "PosixRlimit",
    "ProcessSpec",
    "RemoveContainerRequest",
    "Root",
    "SignalProcessRequest",
    "Spec",
    "StatsContainerResponse",
    "Storage",
    "TtyWinResizeRequest",
    "User",
    "WaitProcessRequest",
    "WaitProcessResponse",
    "decode",
    "encode",
]

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message of the protocol; absent and default are the same on the wire."""


class _Oci(Message, frozen=True, kw_only=True, omit_defaults=True, rename="pascal"):
    """A message of the protocol's OCI part, whose fields begin with capitals."""


class User(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """Numeric identity of a process."""

    uid: int = msgspec.field(default=0, name="UID")
    gid: int = msgspec.field(default=0, name="GID")
    additional_gids: tuple[int, ...] = ()
    username: str = ""


class LinuxCapabilities(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """Capability sets, by name."""

    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


class PosixRlimit(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """One resource limit."""

    type: str
    hard: int
    soft: int


class ProcessSpec(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """A process of a container."""

    terminal: bool = False
    user: User = User()
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = "/"
    capabilities: LinuxCapabilities | None = None
    rlimits: tuple[PosixRlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: int = msgspec.field(default=0, name="OOMScoreAdj")


class Mount(Message, frozen=True, kw_only=True, omit_defaults=True):
    """One mount of a container."""

    destination: str
    source: str
    type: str
    options: tuple[str, ...] = ()


class Root(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """The container's root directory, a guest path."""

    path: str
    readonly: bool = False


class LinuxNamespace(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """A namespace to make, or to join when it has a path."""

    type: str
    path: str = ""


class LinuxDeviceCgroup(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """A rule of the device cgroup."""

    allow: bool = False
    type: str = ""
    major: int = 0
    minor: int = 0
    access: str = ""


class LinuxResources(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """Limits of a container's cgroup."""

    devices: tuple[LinuxDeviceCgroup, ...] = ()


class LinuxSpec(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """The Linux part of the specification."""

    cgroups_path: str = ""
    namespaces: tuple[LinuxNamespace, ...] = ()
    resources: LinuxResources | None = None
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    rootfs_propagation: str = ""


class Spec(_Oci, frozen=True, kw_only=True, omit_defaults=True):
    """The OCI specification of a container."""

    version: str = "1.1.0"
    process: ProcessSpec
    root: Root
    hostname: str = ""
    mounts: tuple[Mount, ...] = ()
    annotations: dict[str, str] = {}
    linux: LinuxSpec


class Storage(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Something the agent mounts in the guest before a container uses it."""

    driver: str
    source: str
    fstype: str
    mount_point: str
    driver_options: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    shared: bool = False


class CreateSandboxRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Prepare the guest for containers."""

    hostname: str = ""
    dns: tuple[str, ...] = ()
    storages: tuple[Storage, ...] = ()
    sandbox_pidns: bool = False
    sandbox_id: str = ""


class CreateContainerRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Make a container and park its process before exec."""

    container_id: str
    exec_id: str
    storages: tuple[Storage, ...] = ()
    spec: Spec = msgspec.field(name="OCI")
    sandbox_pidns: bool = False


class ContainerRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """A request that names only a container (start, stats, pause, resume)."""

    container_id: str


class RemoveContainerRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Kill and remove a container; ``timeout`` in seconds, 0 waits for ever."""

    container_id: str
    timeout: int = 0


class ExecProcessRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Start another process in a container."""

    container_id: str
    exec_id: str
    process: ProcessSpec


class SignalProcessRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Send a signal; an empty ``exec_id`` means the container's first process, or all of them for SIGKILL."""

    container_id: str
    exec_id: str = ""
    signal: int = 0


class WaitProcessRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Wait for a process to end."""

    container_id: str
    exec_id: str


class WaitProcessResponse(msgspec.Struct, frozen=True):
    """Its exit status; 128 + n for signal n."""

    status: int = 0


class CloseStdinRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Close a process's standard input."""

    container_id: str
    exec_id: str


class TtyWinResizeRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Set the size of a process's terminal in characters."""

    container_id: str
    exec_id: str
    row: int
    column: int


class DestroySandboxRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """End every container and power off."""


class AwaitDeviceRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Wait until a device can be used, or with ``gone`` is no more, for ``timeout_ms``. Of casemate's agent alone."""

    subsystem: str
    pci_path: str
    gone: bool = False
    timeout_ms: int = 0


class AwaitDeviceResponse(msgspec.Struct, frozen=True):
    """Its name in the guest, and of a network interface the hardware address; empty when it is gone."""

    name: str = ""
    hardware_address: str = ""


class GuestDetailsRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Ask what the guest can do."""

    mem_block_size: bool = False
    mem_hotplug_probe: bool = False


class AgentDetails(msgspec.Struct, frozen=True):
    """What the agent says of itself."""

    version: str = ""
    init_daemon: bool = False
    device_handlers: tuple[str, ...] = ()
    storage_handlers: tuple[str, ...] = ()
    supports_seccomp: bool = False
    extra_features: tuple[str, ...] = ()


class GuestDetailsResponse(msgspec.Struct, frozen=True):
    """What the guest can do; sizes in bytes."""

    mem_block_size_bytes: int = 0
    agent_details: AgentDetails | None = None
    support_mem_hotplug_probe: bool = False


class CpuUsage(msgspec.Struct, frozen=True):
    """Processor time in nanoseconds."""

    total_usage: int = 0
    percpu_usage: tuple[int, ...] = ()
    usage_in_kernelmode: int = 0
    usage_in_usermode: int = 0


class CpuStats(msgspec.Struct, frozen=True):
    """Processor statistics."""

    cpu_usage: CpuUsage | None = None


class MemoryData(msgspec.Struct, frozen=True):
    """Memory counters in bytes."""

    usage: int = 0
    max_usage: int = 0
    failcnt: int = 0
    limit: int = 0


class MemoryStats(msgspec.Struct, frozen=True):
    """Memory statistics."""

    cache: int = 0
    usage: MemoryData | None = None
    swap_usage: MemoryData | None = None
    stats: dict[str, int] = {}


class PidsStats(msgspec.Struct, frozen=True):
    """Count of processes and its limit, 0 meaning none."""

    current: int = 0
    limit: int = 0


class CgroupStats(msgspec.Struct, frozen=True):
    """Statistics of a container's cgroup."""

    cpu_stats: CpuStats | None = None
    memory_stats: MemoryStats | None = None
    pids_stats: PidsStats | None = None


class StatsContainerResponse(msgspec.Struct, frozen=True):
    """Statistics of a container."""

    cgroup_stats: CgroupStats | None = None


_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """The document of a request."""
    return _encoder.encode(message)


def decode(document: bytes, kind: type[T]) -> T:
    """The answer in a document; fields this version does not know are skipped."""
    return msgspec.json.decode(document, type=kind)
