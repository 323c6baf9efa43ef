"""Whose a directory or document is: nothing of another user's is followed, believed or cleared."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from casemate.errors import InvalidConfigError

__all__ = ["check_place", "read_own"]


def check_place(path: Path) -> None:
    """Check that ``path`` is no link and not another user's; nothing there is fine. Does not block.

    Raises:
        InvalidConfigError: It can't be trusted; the text says why and what to do.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(found.st_mode):
        raise InvalidConfigError(
            f"{path} is a symbolic link, a directory is expected: remove the link, or choose its target as state root",
            path="state_root",
        )
    _check_owner(path, found)


def read_own(path: Path) -> bytes:
    """Content of a regular file that is ours. Blocks: for the read.

    Raises:
        InvalidConfigError: It is a link, no regular file, or another user's.
        OSError: It can't be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        if path.is_symlink():
            raise InvalidConfigError(
                f"{path} is a symbolic link, a state document is expected", path=str(path)
            ) from None
        raise
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidConfigError(
                f"{path} is no regular file, a state document is expected", path=str(path)
            )
        _check_owner(path, found)
        return file.read()


def _check_owner(path: Path, found: os.stat_result) -> None:
    # The administrator may have made what we use.
    if found.st_uid not in (0, os.geteuid()):
        raise InvalidConfigError(
            f"{path} belongs to user {found.st_uid}, not to user {os.geteuid()} who runs this: what it says is not believed",
            path="state_root",
        )
