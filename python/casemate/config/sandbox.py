"""What a sandbox shall be: its machine, its size, its guest and how patient to be with it.

Checking here needs no host; what depends on the host (memory, accelerator) is in :func:`check_host`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from casemate.config import _checks
from casemate.config.monitor import MonitorConfig
from casemate.errors import InvalidConfigError

__all__ = [
    "ACCELERATORS",
    "HYPERVISORS",
    "MACHINES",
    "MAX_HOTPLUG_BRIDGES",
    "MAX_HOTPLUG_PORTS",
    "MAX_VCPUS",
    "MIN_MEMORY_MIB",
    "SandboxConfig",
    "TimeoutConfig",
    "check_host",
]

HYPERVISORS = ("qemu", "mock")
MACHINES = ("q35", "microvm")
ACCELERATORS = ("auto", "kvm", "tcg")
MAX_VCPUS = 288
"""The most of both machine types; software emulation ends at 255, see ``hypervisor.qemu.command_line``."""
MAX_HOTPLUG_PORTS = 16
MAX_HOTPLUG_BRIDGES = 5
MIN_MEMORY_MIB = 64
"""Below it a distribution's kernel does not come up: its image and initrd alone take 40 MiB."""
_MAX_MEMORY_MIB = 16 * 1024 * 1024


class TimeoutConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds until a step is given up. All are multiplied by ``CASEMATE_TIMEOUT_FACTOR``.

    Args:
        boot_s: From the VMM's start until the agent has called.
        request_s: One request to the agent.
        control_s: One command to the VMM.
        hotplug_s: Until the guest has taken or let go a device.
        stop_s: A friendly end of the VM, before it is killed.
    """

    boot_s: float = 60.0
    request_s: float = 30.0
    control_s: float = 10.0
    hotplug_s: float = 30.0
    stop_s: float = 5.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            _checks.check_seconds(name, getattr(self, name))

    def scaled(self, factor: float) -> TimeoutConfig:
        """The same, each times ``factor``."""
        return TimeoutConfig(**{n: min(86400.0, getattr(self, n) * factor) for n in self.__struct_fields__})


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sandbox. Every field has a default.

    Args:
        name: 2 to 64 letters, digits, ``_.-``; None: one is made up.
        hypervisor: The VMM: ``"qemu"``, or ``"mock"``: a fake one without a guest, for tests of what is built on sandboxes.
        machine: ``"q35"`` (everything can be hot-plugged) or ``"microvm"`` (boots faster, its size is fixed).
        accel: ``"kvm"``, ``"tcg"`` (software emulation), or ``"auto"``: KVM where it really works.
        cpu_model: In the VMM's own words; None: ``host`` with KVM, ``max,-erms,-fsrm`` without.
        vcpus: Virtual CPUs at boot, 1 to 288 (255 in software emulation).
        max_vcpus: Room for hot-plug; None: ``vcpus``.
        memory_mib: Guest memory in MiB. The writable layers of containers live in it too, so the default is above what booting needs.
        max_memory_mib: Room for memory hot-plug in MiB; None: ``memory_mib``.
        kernel: Path of a kernel; None: the one in the cache.
        initrd: Path of an initrd with the agent as ``/init``; not with ``image``.
        image: Path of a raw disk image with the agent in it; not with ``initrd``.
        kernel_parameters: Appended after ours, so that they win.
        hostname: In the guest, cut to 64 characters there; None: the sandbox's name.
        hotplug_ports: PCIe root ports kept for later devices, one each, 0 to 16; None: 4 on q35, none on microvm.
        hotplug_bridges: Bridges with room for 30 later devices each, 0 to 5; each takes the place of one of 16 ports.
        qemu_path: Path or name of QEMU's binary; None: that of the settings.
        qemu_arguments: Raw arguments, appended last and not looked at.
        seccomp: Let QEMU deny itself obsolete calls, spawning and resource control.
        debug: More from kernel, agent and VMM, at the price of a slower boot.
        timeouts: How patient to be.
        monitor: How closely it is watched, once somebody wants its events.

    Raises:
        InvalidConfigError: A value without meaning; ``path`` names the field.
    """

    name: str | None = None
    hypervisor: str = "qemu"
    machine: str = "q35"
    accel: str = "auto"
    cpu_model: str | None = None
    vcpus: int = 1
    max_vcpus: int | None = None
    memory_mib: int = 512
    max_memory_mib: int | None = None
    kernel: str | None = None
    initrd: str | None = None
    image: str | None = None
    kernel_parameters: Sequence[str] = ()
    hostname: str | None = None
    hotplug_ports: int | None = None
    hotplug_bridges: int = 0
    qemu_path: str | None = None
    qemu_arguments: Sequence[str] = ()
    seccomp: bool = True
    debug: bool = False
    timeouts: TimeoutConfig = TimeoutConfig()
    monitor: MonitorConfig = MonitorConfig()

    def __post_init__(self) -> None:
        if self.name is not None:
            _checks.check_name("name", self.name)
        if self.hostname is not None:
            _checks.check_hostname("hostname", self.hostname)
        _checks.check_choice("hypervisor", self.hypervisor, HYPERVISORS)
        _checks.check_choice("machine", self.machine, MACHINES)
        _checks.check_choice("accel", self.accel, ACCELERATORS)
        self._check_size()
        self._check_guest()
        for name in ("kernel_parameters", "qemu_arguments"):
            words = _checks.check_words(name, getattr(self, name), empty_word=name == "qemu_arguments")
            msgspec.structs.force_setattr(self, name, words)
        _check_kernel_parameters(self.kernel_parameters)
        self._check_machine()

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> SandboxConfig:
        """From a decoded TOML or JSON table; types are checked too. Raises: InvalidConfigError with the field's path."""
        return _checks.convert_document(document, cls)

    @property
    def root_ports(self) -> int:
        """How many PCIe root ports the machine gets."""
        if self.hotplug_ports is not None:
            return self.hotplug_ports
        return 4 if self.machine == "q35" else 0

    def _check_size(self) -> None:
        _checks.check_integer("vcpus", self.vcpus, 1, MAX_VCPUS, "vCPUs")
        if self.max_vcpus is not None:
            _checks.check_integer("max_vcpus", self.max_vcpus, self.vcpus, MAX_VCPUS, "vCPUs")
        _checks.check_integer("memory_mib", self.memory_mib, MIN_MEMORY_MIB, _MAX_MEMORY_MIB, "MiB")
        if self.max_memory_mib is not None:
            _checks.check_integer(
                "max_memory_mib", self.max_memory_mib, self.memory_mib, _MAX_MEMORY_MIB, "MiB"
            )
        if self.hotplug_ports is not None:
            _checks.check_integer("hotplug_ports", self.hotplug_ports, 0, MAX_HOTPLUG_PORTS, "ports")
        _checks.check_integer("hotplug_bridges", self.hotplug_bridges, 0, MAX_HOTPLUG_BRIDGES, "bridges")
        if self.root_ports + self.hotplug_bridges > MAX_HOTPLUG_PORTS:
            raise InvalidConfigError(
                f"hotplug_bridges is {self.hotplug_bridges} beside {self.root_ports} hotplug_ports, the root bus has room"
                f" for {MAX_HOTPLUG_PORTS} of both; the nearest is {MAX_HOTPLUG_PORTS - self.root_ports}",
                path="hotplug_bridges",
            )

    def _check_guest(self) -> None:
        for name in ("kernel", "initrd", "image", "qemu_path"):
            value = getattr(self, name)
            if value is not None:
                _checks.check_file_path(name, value)
        if self.initrd is not None and self.image is not None:
            raise InvalidConfigError(
                f"image is {self.image!r} and initrd is {self.initrd!r}, the guest boots from one of them: leave one out",
                path="image",
            )
        if self.cpu_model is not None and (not self.cpu_model or self.cpu_model.split() != [self.cpu_model]):
            raise InvalidConfigError(
                f"cpu_model is {self.cpu_model!r}, a model without spaces is expected, as 'max' or 'host,-avx512f'",
                path="cpu_model",
            )

    def _check_machine(self) -> None:
        if self.machine != "microvm":
            return
        for name in ("hotplug_ports", "hotplug_bridges"):
            if getattr(self, name):
                raise InvalidConfigError(
                    f"{name} is {getattr(self, name)}, microvm has no PCIe ports: use 0, or machine 'q35'",
                    path=name,
                )
        for name, now in (("max_vcpus", self.vcpus), ("max_memory_mib", self.memory_mib)):
            if getattr(self, name) not in (None, now):
                raise InvalidConfigError(
                    f"{name} is {getattr(self, name)}, microvm can't grow: use {now}, or machine 'q35'",
                    path=name,
                )


def _check_kernel_parameters(parameters: Sequence[str]) -> None:
    for index, parameter in enumerate(parameters):
        path = f"kernel_parameters[{index}]"
        outside_quotes = "".join(parameter.split('"')[::2])
        if (
            parameter.count('"') % 2
            or len(outside_quotes.split()) > 1
            or outside_quotes.strip() != outside_quotes
        ):
            raise InvalidConfigError(
                f"{path} is {parameter!r}, one parameter is expected, with spaces only inside double quotes;"
                f" give several as {parameter.split()!r}",
                path=path,
            )


def check_host(config: SandboxConfig, *, memory_mib: int) -> None:
    """Check ``config`` against the host's physical memory in MiB.

    Raises:
        InvalidConfigError: More memory than the host has.
    """
    if config.memory_mib > memory_mib:
        raise InvalidConfigError(
            f"memory_mib is {config.memory_mib}, the host has {memory_mib} MiB; the nearest is {memory_mib}",
            path="memory_mib",
        )
