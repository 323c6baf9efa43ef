"""What this machine can do, asked once and only when a test needs to know."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

__all__ = ["MARKERS", "missing", "summary"]


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


def _cgroup_v2() -> str | None:
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        controllers = root / "cgroup.controllers"
        if controllers.exists() and "memory" in controllers.read_text("utf-8").split():
            return None
    return "cgroup v2 memory controller"


MARKERS: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "qemu": _qemu,
    "kvm": _kvm,
    "vhost_vsock": _device("/dev/vhost-vsock"),
    "erofs": _program("mkfs.erofs"),
    "tun": _device("/dev/net/tun"),
    "cgroup_v1": _cgroup_v1,
    "cgroup_v2": _cgroup_v2,
    "mmdebstrap": _program("mmdebstrap"),
    "busybox": _busybox,
    "go": _program("go"),
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
