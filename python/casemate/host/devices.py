"""Devices of the host that sandboxes use, tried as a sandbox would use them."""

from __future__ import annotations

import os
from pathlib import Path

from casemate.errors import CasemateError
from casemate.host.finding import Finding, read_text
from casemate.host.kernel import module_state
from casemate.hypervisor import vsock

__all__ = ["find_tap", "find_vsock", "has_capability"]

_TUNGETFEATURES = 0x800454CF
_IFF_TAP, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x4000, 0x0100
_CAP_NET_ADMIN = 12


def find_vsock(device: str = vsock.DEVICE, *, wanted: str = "auto") -> Finding:
    """How the guest's vsock is served: by the kernel where a context id can really be had from it, else by us.

    Args:
        wanted: As in the settings: ``auto``, ``kernel`` or ``user``.
    """
    if wanted == "user":
        return Finding(
            name="vsock",
            state="yes",
            text="served by casemate itself (vhost-user), as CASEMATE_VSOCK asks",
            facts={"kind": "vhost-user", "wanted": wanted},
        )
    try:
        fd, _ = vsock.reserve_cid(device)
    except CasemateError as error:
        state = module_state("vhost_vsock")
        cures = {
            "available": "modprobe vhost_vsock",
            "unknown": "modprobe vhost_vsock, where the kernel has it",
            "missing": "a host kernel with CONFIG_VHOST_VSOCK, if the last bit of speed matters",
        }
        if wanted == "kernel":
            return Finding(
                name="vsock",
                state="no",
                text=f"CASEMATE_VSOCK asks for the kernel's, but {error}",
                cure=f"{cures.get(state, f'leave to read and write {device}')}, or CASEMATE_VSOCK=auto",
                needed=True,
                facts={"kind": "none", "vhost_vsock": False, "wanted": wanted, "reason": str(error)},
            )
        return Finding(
            name="vsock",
            state="yes",
            text=f"served by casemate itself (vhost-user); not by the kernel: {error}",
            cure=cures.get(state, f"leave to read and write {device}"),
            facts={"kind": "vhost-user", "vhost_vsock": False, "reason": str(error)},
        )
    os.close(fd)
    return Finding(
        name="vsock",
        state="yes",
        text=f"served by the kernel ({device})",
        facts={"kind": "vhost", "vhost_vsock": True},
    )


def has_capability(number: int, root: Path = Path("/")) -> bool:
    """Whether this process holds the capability ``number``. Blocks: for a file read."""
    for line in read_text(root / "proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def find_tap(device: str = "/dev/net/tun", root: Path = Path("/")) -> Finding:
    """Whether this process may make tap devices. None is made."""
    import fcntl

    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Finding(
            name="tap",
            state="no",
            text=f"{device} can't be opened: {error.strerror}",
            cure="modprobe tun" if isinstance(error, FileNotFoundError) else f"leave to open {device}",
        )
    try:
        answer = fcntl.ioctl(fd, _TUNGETFEATURES, bytes(4))
    except OSError as error:
        return Finding(name="tap", state="no", text=f"{device} is no tun device: {error.strerror}")
    finally:
        os.close(fd)
    features = int.from_bytes(answer, "little")
    data = {"multi_queue": bool(features & _IFF_MULTI_QUEUE), "vnet_hdr": bool(features & _IFF_VNET_HDR)}
    if not features & _IFF_TAP:
        return Finding(name="tap", state="no", text=f"{device} makes no tap devices", facts=data)
    if not has_capability(_CAP_NET_ADMIN, root):
        return Finding(
            name="tap",
            state="no",
            text=f"{device} is there, but this process lacks the capability CAP_NET_ADMIN",
            cure="run as root, or give the process CAP_NET_ADMIN",
            facts=data,
        )
    return Finding(name="tap", state="yes", text=f"{device} and CAP_NET_ADMIN", facts=data)
