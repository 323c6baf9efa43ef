"""Locks between processes, writes that last, and what a full disk is called."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path

from casemate._core import remove_tree
from casemate.errors import CasemateError, DeadlineExceededError, HostError, ResourceExhaustedError
from casemate.observe.log import Log

__all__ = [
    "list_directory",
    "locked",
    "removed_at_end",
    "spread_children",
    "sync",
    "try_locked",
    "typed_errors",
    "write_all",
    "write_synced",
]

_log = Log(__name__)

# linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x00020000

_LOCK_RETRY_S = 0.05


@contextlib.contextmanager
def locked(
    path: Path, *, timeout_s: float, shared: bool = False, waiting: Callable[[], None] | None = None
) -> Iterator[int]:
    """Hold the lock file ``path`` during the block, alone unless ``shared``; gives its descriptor, for reads and writes when alone.

    Args:
        waiting: Called every 50 ms while another process has it; what it raises ends the wait.

    Raises: DeadlineExceededError. Blocks: for its holder.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with try_locked(path, shared=shared) as fd:
            if fd is not None:
                yield fd
                return
        # A blocking flock can't be given a deadline, and nothing tells of its release.
        if time.monotonic() > deadline:
            raise DeadlineExceededError(
                f"another process holds {path} for more than {timeout_s:g} s",
                deadline_s=timeout_s,
                waited_s=timeout_s,
            )
        if waiting is not None:
            waiting()
        time.sleep(_LOCK_RETRY_S)


@contextlib.contextmanager
def try_locked(path: Path, *, shared: bool = False) -> Iterator[int | None]:
    """Hold the lock during the block when it can be had at once: then its descriptor, else None. Does not block.

    A file that its holder removes during the block is no lock any more: whoever waited for it makes a new one.
    """
    # A shared lock is also for a cache that can't be written.
    access = os.O_RDONLY if shared else os.O_RDWR
    with typed_errors(path):
        fd = os.open(path, access | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield fd if _is_still(fd, path) else None
    finally:
        os.close(fd)


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def typed_errors(target: Path) -> Iterator[None]:
    """Errors of the system in the block become ours: ResourceExhaustedError for a full disk, else HostError."""
    try:
        yield
    except CasemateError:
        raise
    except OSError as exc:
        where = exc.filename or target
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhaustedError(f"{where} can't be written: {exc.strerror}") from exc
        raise HostError(
            f"{where} can't be written: {exc.strerror or exc}", errno=exc.errno or 0, target=str(where)
        ) from exc


@contextlib.contextmanager
def removed_at_end(work: Path) -> Iterator[None]:
    """Remove ``work`` after the block; a failure of that does not hide the block's own."""
    try:
        yield
    except BaseException as exc:
        try:
            remove_tree(work)
        except HostError as cleanup:
            exc.add_note(f"{work} could not be removed: {cleanup}")
        raise
    remove_tree(work)


def list_directory(directory: Path) -> list[str]:
    """Names in a directory, sorted; none where it is absent."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait for the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_all(file: RawIOBase, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered file: one call may take a part of it."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def spread_children(directory: Path) -> None:
    """Ask ext4 to put each subdirectory elsewhere on the disk (``chattr +T``).

    Without a journal it does not reuse inodes for some minutes and looks at each of them first: unpacking beside a
    tree that was just removed took 22 s instead of 1.2 s.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = bytearray(8)
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        value = int.from_bytes(flags, sys.byteorder)
        if not value & _FS_TOPDIR_FL:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, (value | _FS_TOPDIR_FL).to_bytes(8, sys.byteorder))
    except OSError as exc:
        # Only a hint, and most filesystems do not know it.
        _log.debug("no spreading of directories", extra={"target": str(directory), "errno": exc.errno})
    finally:
        os.close(fd)
