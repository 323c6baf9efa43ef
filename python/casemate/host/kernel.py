"""The host's kernel: modules, their parameters, nesting, protection of guests, NUMA nodes. Reads ``proc`` and ``sys``, loads nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from casemate.host.finding import Finding, read_text
from casemate.hypervisor.host import HostFacts

__all__ = [
    "find_bpf_jit",
    "find_cpu",
    "find_modules",
    "find_nesting",
    "find_numa",
    "find_protection",
    "module_state",
    "parse_cpu_list",
    "read_nodes",
    "read_protection",
]

_KVM_CHECK_EXTENSION = 0xAE03
_KVM_CAP_ARM_RME = 240
_VENDORS = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd"}
_MODULES = {
    "kvm": "hardware virtualisation",
    "vhost": "devices served by the kernel",
    "vhost_net": "network devices served by the kernel",
    "vhost_vsock": "the guest's vsock served by the kernel",
    "tun": "tap devices",
    "erofs": "looking into unpacked images on the host",
    "ifb": "limits on what a guest receives",
}
_PROTECTED_GUESTS = 158
"""The facility of z/Architecture that says so."""


def module_state(name: str, root: Path = Path("/"), release: str | None = None) -> str:
    """``loaded``, ``built in``, ``available`` (it can be loaded), ``missing``, or ``unknown`` on a host without lists of modules.

    Blocks: for reading these lists.
    """
    directory = root / "lib/modules" / (os.uname().release if release is None else release)
    # modules.* write either form of the name.
    pattern = re.compile(rf"(?:^|/){re.sub('[-_]', '[-_]', re.escape(name))}\.ko", re.MULTILINE)
    if pattern.search(read_text(directory / "modules.builtin", 4 << 20)):
        return "built in"
    if (root / "sys/module" / name).is_dir():
        return "loaded"
    # A driver that is built in without parameters has no directory of its own, but its device is there.
    if (root / "sys/class/misc" / name.replace("_", "-")).is_dir():
        return "built in"
    known = read_text(directory / "modules.dep", 16 << 20)
    if not known:
        return "unknown"
    return "available" if pattern.search(known) else "missing"


def find_modules(facts: HostFacts, root: Path = Path("/"), release: str | None = None) -> Finding:
    """Modules that a sandbox can make use of. None is needed by itself: what it gives is looked at on its own."""
    wanted = dict(_MODULES)
    vendor = _VENDORS.get(facts.cpu_vendor)
    if vendor and facts.has_hardware_virtualisation:
        wanted[vendor] = "hardware virtualisation of this CPU"
    states = {name: module_state(name, root, release) for name in wanted}
    there = [name for name, state in states.items() if state in ("loaded", "built in")]
    loadable = [name for name, state in states.items() if state == "available"]
    missing = [name for name, state in states.items() if state == "missing"]
    words = [f"there: {', '.join(there) or 'none'}"]
    if loadable:
        words.append(f"not loaded: {', '.join(loadable)}")
    if missing:
        words.append(f"not in this kernel: {', '.join(missing)}")
    unknown = [name for name, state in states.items() if state == "unknown"]
    if unknown:
        words.append(f"not to be told, for the kernel has no list of modules here: {', '.join(unknown)}")
    return Finding(
        name="modules",
        state="yes" if len(there) == len(states) else "partly",
        text="; ".join(words),
        cure=f"modprobe {' '.join(loadable)}, as far as you want what they give" if loadable else "",
        facts={"states": states, "for": wanted},
    )


def find_cpu(facts: HostFacts) -> Finding:
    """The CPU's maker and whether it says that it virtualises."""
    flag = next((name for name in ("vmx", "svm") if name in facts.cpu_flags), "")
    wide = {"lm", "sse4_1"} - facts.cpu_flags
    made_by = facts.cpu_vendor or "unknown maker"
    data = {"vendor": facts.cpu_vendor, "virtualisation": flag, "missing": sorted(wide)}
    if not flag:
        return Finding(
            name="cpu",
            state="no",
            text=f"{made_by}: neither vmx nor svm",
            cure="turn on VT-x or AMD-V in the firmware; in a virtual machine: nested virtualisation on its host",
            facts=data,
        )
    lack = f", without {' and '.join(sorted(wide))}" if wide else ""
    return Finding(name="cpu", state="partly" if wide else "yes", text=f"{made_by}: {flag}{lack}", facts=data)


def find_nesting(facts: HostFacts, root: Path = Path("/")) -> Finding:
    """Whether this host is a guest itself, and whether its own guests could have guests."""
    below = {}
    for module in ("kvm_intel", "kvm_amd"):
        value = read_text(root / "sys/module" / module / "parameters/nested").strip()
        if value:
            below[module] = _is_on(value)
    text = "this host is itself a virtual machine" if facts.is_nested else "this host is no virtual machine"
    if below:
        text += "; its guests can virtualise too" if any(below.values()) else "; its guests can't virtualise"
    return Finding(
        name="nested", state="yes", text=text, facts={"is_guest": facts.is_nested, "nested": below}
    )


def read_protection(root: Path = Path("/"), machine: str | None = None) -> str:
    """How this host can protect guests from itself: ``tdx``, ``snp``, ``sev``, ``cca``, ``pef``, ``se`` or ``none``.

    Blocks: for file reads.
    """
    machine = os.uname().machine if machine is None else machine
    if machine == "x86_64":
        if _is_on(read_text(root / "sys/module/kvm_intel/parameters/tdx")):
            return "tdx"
        if _is_on(read_text(root / "sys/module/kvm_amd/parameters/sev_snp")):
            return "snp"
        return "sev" if _is_on(read_text(root / "sys/module/kvm_amd/parameters/sev")) else "none"
    if machine == "aarch64":
        return "cca" if _kvm_has(_KVM_CAP_ARM_RME, root / "dev/kvm") else "none"
    if machine == "ppc64le":
        return "pef" if (root / "sys/firmware/ultravisor").is_dir() else "none"
    if machine == "s390x":
        return "se" if _has_secure_execution(root) else "none"
    return "none"


def find_protection(root: Path = Path("/"), machine: str | None = None) -> Finding:
    """Protection of guests from the host."""
    kind = read_protection(root, machine)
    if kind == "none":
        return Finding(
            name="protection",
            state="no",
            text="guests are not protected from the host (no TDX, SEV, CCA, PEF or Secure Execution)",
            facts={"kind": kind},
        )
    return Finding(
        name="protection", state="yes", text=f"the host can protect guests: {kind}", facts={"kind": kind}
    )


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("y", "1", "yes", "on")


def _kvm_has(capability: int, device: Path) -> bool:
    import fcntl

    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, _KVM_CHECK_EXTENSION, capability) == 1
    except OSError:
        return False
    finally:
        os.close(fd)


def _has_secure_execution(root: Path) -> bool:
    facilities: set[str] = set()
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "facilities":
            facilities.update(value.split())
    wanted = [word for word in read_text(root / "proc/cmdline").split() if word.startswith("prot_virt=")]
    return (
        str(_PROTECTED_GUESTS) in facilities
        and bool(wanted)
        and _is_on(wanted[-1].removeprefix("prot_virt="))
    )


def parse_cpu_list(text: str) -> list[int]:
    """The numbers of ``0-3,8``. Parts that are none are left out: the kernel writes none."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if first.isdigit() and (not dash or last.isdigit()):
            numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def read_nodes(root: Path = Path("/")) -> list[dict[str, object]]:
    """The host's NUMA nodes that are online: their CPUs, memory and distances. Blocks: for file reads."""
    base = root / "sys/devices/system/node"
    nodes: list[dict[str, object]] = []
    for number in parse_cpu_list(read_text(base / "online")):
        directory = base / f"node{number}"
        memory = re.search(r"MemTotal:\s+(\d+) kB", read_text(directory / "meminfo"))
        nodes.append(
            {
                "node": number,
                "cpus": parse_cpu_list(read_text(directory / "cpulist")),
                "memory_mib": int(memory[1]) // 1024 if memory else 0,
                "distances": [int(word) for word in read_text(directory / "distance").split()],
            }
        )
    return nodes


def find_numa(root: Path = Path("/")) -> Finding:
    """NUMA nodes of the host."""
    nodes = read_nodes(root)
    if not nodes:
        return Finding(
            name="numa", state="no", text="the kernel tells of no NUMA nodes", facts={"nodes": nodes}
        )
    word = "node" if len(nodes) == 1 else "nodes"
    return Finding(name="numa", state="yes", text=f"{len(nodes)} {word}", facts={"nodes": nodes})


def find_bpf_jit(root: Path = Path("/")) -> Finding:
    """Whether the kernel compiles system call filters, through which each call of QEMU goes."""
    value = read_text(root / "proc/sys/net/core/bpf_jit_enable").strip()
    if value in ("1", "2"):
        return Finding(name="seccomp_jit", state="yes", text="system call filters are compiled")
    if not value:
        return Finding(
            name="seccomp_jit",
            state="partly",
            text="the kernel has no setting net.core.bpf_jit_enable (built in for good, or no compiler)",
        )
    return Finding(
        name="seccomp_jit",
        state="partly",
        text="system call filters are interpreted: each call of QEMU is slower",
        cure="sysctl net.core.bpf_jit_enable=1",
    )
