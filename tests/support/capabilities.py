"""What this machine can do, asked once and only when a test needs to know."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

__all__ = ["IN_LAB", "MARKERS", "missing", "summary"]

IN_LAB = os.environ.get("CASEMATE_IN_LAB") == "1"
"""Whether this machine is the lab of ``tests/lab``."""


def _root() -> str | None:
    return None if os.geteuid() == 0 else "user id 0"


def _qemu() -> str | None:
    name = os.environ.get("CASEMATE_QEMU") or "qemu-system-x86_64"
    return None if shutil.which(name) else f"{name} on PATH"


def _kvm() -> str | None:
    # An open /dev/kvm proves nothing: a host may offer it without hardware that runs a stock guest.
    flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    if not {"vmx", "svm"} & set(flags):
        return "hardware virtualisation (vmx or svm)"
    return None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm"


def _device(path: str) -> Callable[[], str | None]:
    return lambda: None if os.access(path, os.R_OK | os.W_OK) else path


def _program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"{name} on PATH"


def _busybox() -> str | None:
    path = shutil.which("busybox")
    if path is None:
        return "busybox on PATH"
    # A program with an interpreter is not static; its header names it.
    return f"a static busybox ({path} is linked dynamically)" if b"/ld-" in _head(path) else None


def _head(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(4096)


def _cgroup_v1() -> str | None:
    return None if Path("/sys/fs/cgroup/memory/tasks").exists() else "cgroup v1 memory controller"


def _cgroup2() -> str | None:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if controllers.exists() and {"cpu", "memory", "pids"} <= set(controllers.read_text("utf-8").split()):
        return None
    return "a unified cgroup hierarchy with cpu, memory and pids"


def _systemd() -> str | None:
    return None if Path("/run/systemd/system").is_dir() else "systemd as process 1"


def _vfio() -> str | None:
    if not os.access("/dev/vfio/vfio", os.R_OK | os.W_OK):
        return "/dev/vfio/vfio"
    groups = Path("/sys/kernel/iommu_groups")
    return None if groups.is_dir() and any(groups.iterdir()) else "an IOMMU with groups"


def _ipvlan() -> str | None:
    # The module may be built in, loaded, or loadable: only making a link tells. In a namespace that ends with the shell.
    script = "ip link add v0 type veth peer name v1 && ip link add i0 link v0 type ipvlan mode l2"
    try:
        made = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, check=False)
    except FileNotFoundError:
        return "unshare on PATH"
    return None if made.returncode == 0 else "ipvlan links"


def _binary(variable: str, name: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        return None if shutil.which(os.environ.get(variable) or name) else f"{name} on PATH or in {variable}"

    return probe


def _registry() -> str | None:
    if shutil.which("skopeo") is None:
        return "skopeo on PATH"
    found = shutil.which("docker-registry") or (shutil.which("apt-get") and shutil.which("dpkg-deb"))
    return None if found else "docker-registry on PATH, or apt-get and dpkg-deb to fetch it"


MARKERS: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "qemu": _qemu,
    "kvm": _kvm,
    "vhost_vsock": _device("/dev/vhost-vsock"),
    "erofs": _program("mkfs.erofs"),
    "tun": _device("/dev/net/tun"),
    "cgroup_v1": _cgroup_v1,
    "cgroup2": _cgroup2,
    "systemd": _systemd,
    "vfio": _vfio,
    "ipvlan": _ipvlan,
    "firecracker": _binary("CASEMATE_FIRECRACKER_BIN", "firecracker"),
    "cloud_hypervisor": _binary("CASEMATE_CLH_BIN", "cloud-hypervisor"),
    "mmdebstrap": _program("mmdebstrap"),
    "busybox": _busybox,
    "go": _program("go"),
    "tmux": _program("tmux"),
    "fish": _program("fish"),
    "zsh": _program("zsh"),
    "registry": _registry,
}


@functools.cache
def missing(marker: str) -> str | None:
    """What the machine lacks for tests of ``marker``; None when they can run."""
    return MARKERS[marker]()


@functools.cache
def summary() -> str:
    """One line: what is there, what is not, which QEMU."""
    words = [f"{name} {'no' if missing(name) else 'yes'}" for name in MARKERS]
    if missing("qemu") is None:
        name = os.environ.get("CASEMATE_QEMU") or "qemu-system-x86_64"
        version = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
        words.append(version.partition("\n")[0].removeprefix("QEMU emulator ").strip())
    return ", ".join(words)
