"""Which processes hold sockets that were bound in a directory: what a VMM has even when nobody recorded it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["find_socket_holders"]


def find_socket_holders(directory: Path) -> tuple[int, ...]:
    """Ids of the other processes that hold a socket bound below ``directory``. Blocks: for reads of ``/proc``.

    A socket that was inherited or accepted keeps the path it was bound to, also when the file is gone. Only sockets of this
    network namespace are seen.

    Source: proc(5), ``/proc/net/unix``.
    """
    inodes = _bound_below(directory)
    if not inodes:
        return ()
    wanted = {f"socket:[{inode}]" for inode in inodes}
    own = str(os.getpid())
    return tuple(
        int(pid) for pid in os.listdir("/proc") if pid.isdigit() and pid != own and _holds(pid, wanted)
    )


def _bound_below(directory: Path) -> set[str]:
    prefixes = tuple({f"{directory}/", f"{directory.resolve()}/"})
    inodes = set()
    for line in Path("/proc/net/unix").read_text("utf-8", "surrogateescape").splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and fields[7].startswith(prefixes):
            inodes.add(fields[6])
    return inodes


def _holds(pid: str, wanted: set[str]) -> bool:
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # It is gone, or another user's, who can't have a socket in a directory that is ours alone.
        return False
    for number in numbers:
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}") in wanted:
                return True
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return False
