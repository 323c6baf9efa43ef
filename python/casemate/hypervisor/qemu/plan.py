"""What a QEMU VM shall be, decided before anything is made. Pure: the command line says what the plan says, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import msgspec
from msgspec import structs

from casemate.config.sandbox import SandboxConfig
from casemate.errors import InvalidConfigError, ResourceExhaustedError, UnsupportedError
from casemate.hypervisor import BlockAddress, BlockDevice, Capabilities, GuestAssets
from casemate.hypervisor.pci import Bridge, BridgeKind, PciAddress, PciPath, Topology
from casemate.hypervisor.qemu import devices
from casemate.hypervisor.qemu.accel import Accelerator

__all__ = [
    "FIRST_FD",
    "VmPlan",
    "VsockChoice",
    "block_node",
    "capabilities",
    "check_disk",
    "check_id",
    "disk_device",
    "make_plan",
]

FIRST_FD = 3
"""Descriptors in QEMU are numbered from here: QMP listener, console, vsock."""

# The root bus of q35. Slot 0 is the host bridge, 31 the ISA bridge.
_RNG_SLOT = 0x01
_VSOCK_SLOT = 0x02
_DISK_SLOTS = range(0x03, 0x0F)
_PORT_SLOTS = range(0x0F, 0x1F)
_MMIO_DEVICES = 8
"""Virtio transports that microvm has at least (24 with a second interrupt controller)."""
_MAX_VCPUS_TCG = 255
_MAX_VCPUS_KVM = 288
_MAX_ID = 31
_MAX_SERIAL = 20
# Without «fast string» bits the kernel copies with plain moves, which TCG translates well; a repeated string move is a slow loop there.
_TCG_CPU = "max,-erms,-fsrm"
# One thread for all vCPUs. With a thread each, QEMU 7.2 drops translated code before the store that changes it is done: another vCPU
# can translate the old bytes again and keep them. A kernel that patches itself then meets a stale breakpoint, once in some sixty boots.
_TCG_SEVERAL_VCPUS = (("thread", "single"),)
_VSOCK_KINDS = ("vhost", "vhost-user", "none")


class VsockChoice(msgspec.Struct, frozen=True, kw_only=True):
    """How the guest's vsock is served.

    Args:
        kind: ``"vhost"``: by the host's kernel; ``"vhost-user"``: by the process at the other end of a socket; ``"none"``.
        guest_cid: The guest's context id.
        path: For ``vhost-user``: a socket to connect to; None: a connected socket is handed over.
    """

    kind: str
    guest_cid: int = 3
    path: str | None = None


class VmPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A VM, complete.

    Args:
        fds: Name of each descriptor handed over to its number in QEMU: ``qmp``, ``console``, ``vsock``.
        disks: Where the guest finds each disk, in the order given.
        topology: The bridges that later devices come behind, empty at boot.
    """

    qemu: str
    sandbox_id: str
    uuid: str
    machine: str
    machine_options: tuple[tuple[str, str | int | bool], ...]
    accelerator: Accelerator
    accelerator_options: tuple[tuple[str, str], ...]
    cpu: str
    vcpus: int
    max_vcpus: int
    memory_mib: int
    max_memory_mib: int
    fds: dict[str, int]
    chardevs: tuple[devices.Chardev, ...]
    memory: devices.MemoryBackend | None
    rng: devices.RngBackend
    nodes: tuple[devices.BlockNode, ...]
    devices: tuple[devices.Device, ...]
    assets: GuestAssets
    disks: tuple[BlockAddress, ...]
    topology: Topology
    extra_arguments: tuple[str, ...]
    seccomp: bool
    debug: bool


def make_plan(
    config: SandboxConfig,
    *,
    sandbox_id: str,
    uuid: str,
    qemu: str,
    accelerator: Accelerator,
    assets: GuestAssets,
    vsock: VsockChoice,
    disks: Sequence[BlockDevice] = (),
) -> VmPlan:
    """The plan of the VM that ``config`` asks for, on the accelerator that was chosen. Does not block.

    Raises:
        InvalidConfigError: More vCPUs than machine and accelerator allow, or assets that don't fit together.
        ResourceExhaustedError: More disks than there are slots.
    """
    _check(config, accelerator, assets, vsock, uuid)
    pci = config.machine == "q35"
    fds = {"qmp": FIRST_FD, "console": FIRST_FD + 1}
    chardevs = [
        devices.Chardev(id="qmp", fd=fds["qmp"], server=True),
        devices.Chardev(id="console", fd=fds["console"]),
    ]
    if vsock.kind == "vhost" or (vsock.kind == "vhost-user" and vsock.path is None):
        fds["vsock"] = FIRST_FD + 2
    if vsock.kind == "vhost-user":
        chardevs.append(devices.Chardev(id="vsock", fd=fds.get("vsock"), path=vsock.path))
    bridges, topology = _plan_bridges(config)
    all_disks = [*_image_disk(assets), *disks]
    addresses = _place_disks(all_disks, pci)
    return VmPlan(
        qemu=qemu,
        sandbox_id=sandbox_id,
        uuid=uuid,
        machine=config.machine,
        machine_options=_machine_options(config, vsock),
        accelerator=accelerator,
        accelerator_options=_TCG_SEVERAL_VCPUS
        if accelerator.name == "tcg" and (config.max_vcpus or config.vcpus) > 1
        else (),
        cpu=config.cpu_model or ("host" if accelerator.name == "kvm" else _TCG_CPU),
        vcpus=config.vcpus,
        max_vcpus=config.max_vcpus or config.vcpus,
        memory_mib=config.memory_mib,
        max_memory_mib=config.max_memory_mib or config.memory_mib,
        fds=fds,
        chardevs=tuple(chardevs),
        memory=devices.MemoryBackend(id="mem0", size_mib=config.memory_mib)
        if vsock.kind == "vhost-user"
        else None,
        rng=devices.RngBackend(id="rng0"),
        nodes=tuple(block_node(disk) for disk in all_disks),
        devices=(
            *bridges,
            devices.VirtioRng(id="virtio-rng0", rng="rng0", **_placed(_RNG_SLOT, pci)),
            *_vsock_devices(vsock, fds, pci),
            *(
                disk_device(disk, _placed(slot, pci))
                for disk, slot in zip(all_disks, _DISK_SLOTS, strict=False)
            ),
        ),
        assets=assets,
        disks=tuple(addresses[len(all_disks) - len(disks) :]),
        topology=topology,
        extra_arguments=tuple(config.qemu_arguments),
        seccomp=config.seccomp,
        debug=config.debug,
    )


def capabilities(machine: str, accelerator: str) -> Capabilities:
    """What ``machine`` can do on ``accelerator``."""
    q35 = machine == "q35"
    return Capabilities(
        block_hotplug=q35,
        network_hotplug=q35,
        vcpu_hotplug=q35,
        memory_hotplug=q35,
        pause=True,
        pci=q35,
        max_vcpus=_MAX_VCPUS_KVM if accelerator == "kvm" else _MAX_VCPUS_TCG,
    )


def block_node(disk: BlockDevice) -> devices.BlockNode:
    """The block node of ``disk``."""
    return devices.BlockNode(
        name=f"drive-{disk.id}",
        path=disk.path,
        read_only=disk.read_only,
        host_device=disk.host_device,
        discard=disk.discard,
        direct=disk.direct,
    )


def disk_device(disk: BlockDevice, place: Place) -> devices.VirtioBlk:
    """The device of ``disk`` at ``place``."""
    return devices.VirtioBlk(
        id=f"virtio-{disk.id}",
        node=f"drive-{disk.id}",
        serial=disk.serial,
        read_only=disk.read_only,
        **place,
    )


def check_id(device_id: str) -> str:
    """What is wrong with a device's name; empty when QEMU can have it."""
    if not device_id[:1].isalpha() or len(device_id) > _MAX_ID:
        return f"has the id {device_id!r}, a letter first and at most {_MAX_ID} characters are expected"
    if not all(c.isascii() and (c.isalnum() or c in "-_.") for c in device_id):
        return f"has the id {device_id!r}, letters, digits, '-', '_' and '.' are expected"
    return ""


def check_disk(disk: BlockDevice) -> None:
    """Raise InvalidConfigError when ``disk`` can't be handed to QEMU."""
    fault = check_id(disk.id)
    if not disk.path:
        fault = "has no path"
    elif not fault and not 0 < len(disk.serial.encode()) <= _MAX_SERIAL:
        fault = f"has the serial number {disk.serial!r}, 1 to {_MAX_SERIAL} bytes are expected"
    if fault:
        raise InvalidConfigError(f"disk {disk.path!r} {fault}", path="disks")


def _check(
    config: SandboxConfig, accelerator: Accelerator, assets: GuestAssets, vsock: VsockChoice, uuid: str
) -> None:
    most = capabilities(config.machine, accelerator.name).max_vcpus
    for name, count in (("vcpus", config.vcpus), ("max_vcpus", config.max_vcpus or config.vcpus)):
        if count > most:
            raise InvalidConfigError(
                f"{name} is {count}, 1 to {most} vCPUs are possible with {config.machine} on {accelerator.name};"
                f" the nearest is {most}",
                path=name,
            )
    if not assets.kernel:
        raise InvalidConfigError("no kernel is given", path="kernel")
    if (assets.initrd is None) == (assets.image is None):
        raise InvalidConfigError(
            "the guest boots from an initrd or a disk image: exactly one of them is expected", path="initrd"
        )
    if not uuid:
        raise InvalidConfigError("uuid is empty, a random one is expected", path="uuid")
    if vsock.kind not in _VSOCK_KINDS:
        raise InvalidConfigError(
            f"vsock is {vsock.kind!r}, one of {', '.join(_VSOCK_KINDS)} is expected", path="vsock"
        )
    if not 3 <= vsock.guest_cid < 2**32 - 1:
        raise InvalidConfigError(
            f"guest_cid is {vsock.guest_cid}, 3 to {2**32 - 2} are possible", path="vsock.guest_cid"
        )
    if (
        config.cpu_model is not None
        and config.cpu_model.split(",")[0] == "host"
        and accelerator.name != "kvm"
    ):
        raise UnsupportedError(
            f"cpu_model 'host' needs KVM, and the accelerator is {accelerator.name} ({accelerator.reason}); use 'max'",
            capability="kvm",
        )


def _machine_options(config: SandboxConfig, vsock: VsockChoice) -> tuple[tuple[str, str | int | bool], ...]:
    options: list[tuple[str, str | int | bool]] = []
    if config.machine == "q35":
        # No disk controller, no SMBus, no VMware port: firmware and kernel need not look at them.
        options += [("vmport", False), ("smbus", False), ("sata", False)]
    else:
        # Kernels of distributions learn of MMIO devices from ACPI alone, and without the clock chip lose a second at boot.
        options += [("acpi", True), ("rtc", True)]
    options.append(("dump-guest-core", False))
    if vsock.kind == "vhost-user":
        options.append(("memory-backend", "mem0"))
    return tuple(options)


def _image_disk(assets: GuestAssets) -> list[BlockDevice]:
    if assets.image is None:
        return []
    return [BlockDevice(id="image", path=assets.image, read_only=True, serial="image")]


def _place_disks(disks: Sequence[BlockDevice], pci: bool) -> list[BlockAddress]:
    room = len(_DISK_SLOTS) if pci else _MMIO_DEVICES - 2
    if len(disks) > room:
        raise ResourceExhaustedError(
            f"{len(disks)} disks are wanted at boot, the machine has room for {room}"
        )
    names = [disk.id for disk in disks]
    for disk in disks:
        check_disk(disk)
        if names.count(disk.id) > 1:
            raise InvalidConfigError(f"two disks have the id {disk.id!r}", path="disks")
    return [
        BlockAddress(id=disk.id, pci_path=str(PciPath.of_slots(slot)) if pci else None, serial=disk.serial)
        for disk, slot in zip(disks, _DISK_SLOTS, strict=False)
    ]


class Place(TypedDict, total=False):
    """Bus and slot of a device; empty: the machine chooses."""

    bus: str
    slot: int


def _placed(slot: int, pci: bool) -> Place:
    return {"bus": devices.ROOT_BUS, "slot": slot} if pci else {}


def _plan_bridges(config: SandboxConfig) -> tuple[list[devices.Device], Topology]:
    """Root ports, then bridges behind root ports of their own: in this order they are filled."""
    made: list[devices.Device] = []
    bridges: list[Bridge] = []
    for number in range(config.root_ports):
        port = _port(f"rp{number}", number)
        made.append(port)
        bridges.append(_bridge_of(port))
    for number in range(config.hotplug_bridges):
        port = _port(f"rpbr{number}", config.root_ports + number)
        made += [port, devices.PciePciBridge(id=f"br{number}", bus=port.id, slot=0)]
        bridges.append(structs.replace(_bridge_of(port), open=False))
        bridges.append(
            Bridge(id=f"br{number}", kind=BridgeKind.PCIE_BRIDGE, address=str(PciAddress(0)), parent=port.id)
        )
    return made, Topology(bridges=tuple(bridges))


def _port(name: str, number: int) -> devices.PcieRootPort:
    return devices.PcieRootPort(id=name, number=number, bus=devices.ROOT_BUS, slot=_PORT_SLOTS[number])


def _bridge_of(port: devices.PcieRootPort) -> Bridge:
    assert port.slot is not None
    return Bridge(id=port.id, kind=BridgeKind.ROOT_PORT, address=str(PciAddress(port.slot)))


def _vsock_devices(vsock: VsockChoice, fds: dict[str, int], pci: bool) -> list[devices.Device]:
    placed = _placed(_VSOCK_SLOT, pci)
    if vsock.kind == "vhost":
        return [devices.VhostVsock(id="vsock0", guest_cid=vsock.guest_cid, vhost_fd=fds["vsock"], **placed)]
    if vsock.kind == "vhost-user":
        return [devices.VhostUserVsock(id="vsock0", chardev="vsock", **placed)]
    return []
