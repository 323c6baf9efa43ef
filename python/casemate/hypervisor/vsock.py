"""vsock served by the host's kernel: whether it is there, and a context id that no other VM holds."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from casemate.errors import HostError, ResourceExhaustedError

__all__ = ["DEVICE", "FIRST_CID", "LAST_CID", "SET_GUEST_CID", "is_usable", "reserve_cid"]

DEVICE = "/dev/vhost-vsock"
SET_GUEST_CID = 0x4008AF60
"""VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h where _IOW is 1, as on x86 and arm."""
FIRST_CID = 3
"""Smaller ones mean the hypervisor, the machine itself and the host."""
LAST_CID = 2**32 - 2
"""The one above it means any."""
_TRIES = 64
"""Chance of 64 taken ones in a row on a host of a thousand VMs: below 10**-400."""


def is_usable(device: str = DEVICE) -> bool:
    """Whether the kernel serves vsock to a VM of this process. Blocks: for a system call."""
    try:
        # Its mode proves nothing: root may be kept from it by a device cgroup, and the node be there without the module.
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def reserve_cid(
    device: str = DEVICE,
    *,
    set_cid: Callable[[int, bytes], object] | None = None,
    choose: Callable[[int, int], int] | None = None,
) -> tuple[int, int]:
    """A descriptor of ``device`` that holds a context id, and that id. The id is free again when all copies are closed.

    Args:
        set_cid: Asks the kernel for an id, given the descriptor and the id as 8 bytes; for tests.
        choose: Picks a number from first to last; for tests.

    Raises:
        HostError: The device can't be opened or refuses for another reason than a taken id.
        ResourceExhaustedError: 64 ids were taken.
    Blocks: for a system call.
    """
    ask = set_cid or _ask
    pick = choose or _pick
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _host_error(device, "can't be opened", error) from error
    try:
        for _ in range(_TRIES):
            cid = pick(FIRST_CID, LAST_CID)
            try:
                ask(fd, cid.to_bytes(8, sys.byteorder))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise _host_error(device, f"refused the context id {cid}", error) from error
            else:
                return fd, cid
        raise ResourceExhaustedError(f"no free vsock context id in {_TRIES} tries")
    except BaseException:
        os.close(fd)
        raise


def _pick(first: int, last: int) -> int:
    # Not the module random: it costs 4 ms to import.
    return first + int.from_bytes(os.urandom(8), "little") % (last - first + 1)


def _ask(fd: int, cid: bytes) -> None:
    import fcntl  # here: hosts without the device never need it

    fcntl.ioctl(fd, SET_GUEST_CID, cid)


def _host_error(device: str, what: str, error: OSError) -> HostError:
    return HostError(
        f"{device} {what}: {error.strerror}", errno=error.errno or 0, target=device, op="vsock.reserve_cid"
    )
