"""What this host offers to virtual machines. Reading is here, deciding elsewhere, so that decisions are tested without a host."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from casemate.errors import HostError

__all__ = ["HostFacts", "parse_cpu_flags", "parse_cpu_vendor", "parse_memory_mib", "read_host_facts"]

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_API_VERSION = 12
_KVM_MODULES = ("kvm", "kvm_amd", "kvm_intel", "kvm_pvm")
_CPUINFO_BYTES = 64 * 1024
"""One CPU's entry is 1.5 KiB; a host of hundreds has megabytes of the same."""


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a host.

    Args:
        memory_mib: Physical memory in MiB.
        cpu_flags: Flags of the first CPU.
        kvm_error: Why KVM can't make a VM, empty when it can.
        pvm: KVM works by page-table tricks, without hardware help: a stock guest kernel fails on it.
        kvm_modules: Those of the host's modules that make up KVM, by name, loaded or built in.
        cpu_vendor: The CPU's maker, as ``GenuineIntel``; empty when the kernel does not say.
    """

    memory_mib: int
    cpu_flags: frozenset[str]
    kvm_error: str
    pvm: bool
    kvm_modules: tuple[str, ...] = ()
    cpu_vendor: str = ""

    @property
    def has_hardware_virtualisation(self) -> bool:
        """Whether the CPU says that it virtualises."""
        return not self.cpu_flags.isdisjoint({"vmx", "svm"})

    @property
    def is_nested(self) -> bool:
        """Whether this host is itself a guest."""
        return "hypervisor" in self.cpu_flags


def read_host_facts(root: Path = Path("/")) -> HostFacts:
    """Facts of the host whose ``proc``, ``sys`` and ``dev`` are below ``root``. Blocks: for a few file reads.

    Raises:
        HostError: ``proc`` can't be read.
    """
    meminfo = _read(root / "proc" / "meminfo", _CPUINFO_BYTES)
    cpuinfo = _read(root / "proc" / "cpuinfo", _CPUINFO_BYTES)
    modules = tuple(name for name in _KVM_MODULES if (root / "sys" / "module" / name).is_dir())
    return HostFacts(
        memory_mib=parse_memory_mib(meminfo),
        cpu_flags=parse_cpu_flags(cpuinfo),
        cpu_vendor=parse_cpu_vendor(cpuinfo),
        kvm_error=_try_kvm(root / "dev" / "kvm"),
        pvm="kvm_pvm" in modules,
        kvm_modules=modules,
    )


def parse_cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Flags of the first CPU in the text of ``/proc/cpuinfo``; empty without a flags line."""
    for line in cpuinfo.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def parse_cpu_vendor(cpuinfo: str) -> str:
    """The first CPU's maker in the text of ``/proc/cpuinfo``; empty without one."""
    for line in cpuinfo.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == "vendor_id":
            return value.strip()
    return ""


def parse_memory_mib(meminfo: str) -> int:
    """Physical memory in MiB from the text of ``/proc/meminfo``. Raises: HostError."""
    for line in meminfo.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "MemTotal:" and words[1].isdigit():
            return int(words[1]) // 1024
    raise HostError("the host's memory is not in meminfo: no line MemTotal", target="meminfo")


def _read(path: Path, max_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes).decode("ascii", "replace")
    except OSError as error:
        raise HostError(
            f"{path} can't be read: {error.strerror}", errno=error.errno or 0, target=str(path)
        ) from error


def _try_kvm(device: Path) -> str:
    import fcntl  # here: 0.3 ms that a plan without a host does not need

    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device} can't be opened: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
        if version != _KVM_API_VERSION:
            return f"{device} speaks version {version} of the interface, {_KVM_API_VERSION} is expected"
        os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    except OSError as error:
        busy = " (another hypervisor uses the CPU's virtualisation)" if error.errno == 16 else ""
        return f"{device} makes no VM: {error.strerror}{busy}"
    finally:
        os.close(fd)
    return ""
