"""The ``newc`` cpio archive that the kernel unpacks as its first root: a writer and a reader of its structure. Pure.

The same members give the same bytes: no times, no inode numbers of this host, no user.
Format: the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterable, Iterator

import msgspec

__all__ = [
    "HEADER_BYTES",
    "CpioError",
    "Member",
    "directory",
    "file",
    "node",
    "read_header",
    "symlink",
    "write",
]

HEADER_BYTES = 110
MAGICS = (b"070701", b"070702")
TRAILER = b"TRAILER!!!"
MAX_NAME_BYTES = 4096


class CpioError(ValueError):
    """The data is no newc archive or not a whole one."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the archive.

    Args:
        name: Path without a leading slash.
        mode: Type and permission bits as in ``st_mode``.
        data: Content of a file, target of a symbolic link.
        device: Major and minor number of a device node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(name: str, data: bytes, permissions: int = 0o644) -> Member:
    """A regular file."""
    return Member(name=name, mode=stat.S_IFREG | permissions, data=data)


def directory(name: str, permissions: int = 0o755) -> Member:
    """A directory."""
    return Member(name=name, mode=stat.S_IFDIR | permissions)


def symlink(name: str, target: str) -> Member:
    """A symbolic link."""
    return Member(name=name, mode=stat.S_IFLNK | 0o777, data=target.encode())


def node(name: str, major: int, minor: int, permissions: int = 0o600) -> Member:
    """A character device node."""
    return Member(name=name, mode=stat.S_IFCHR | permissions, device=(major, minor))


def write(members: Iterable[Member]) -> bytes:
    """The archive of ``members``: sorted by name, so that a directory comes before what is in it.

    Raises:
        ValueError: A name is given twice, is absolute, or leaves the root.
    """
    ordered = sorted(members, key=lambda member: member.name.split("/"))
    parts: list[bytes] = []
    previous = None
    for number, member in enumerate(ordered, start=1):
        if member.name == previous:
            raise ValueError(f"{member.name} is given twice")
        if not member.name or member.name.startswith("/") or ".." in member.name.split("/"):
            raise ValueError(f"{member.name!r} is not a path below the root")
        previous = member.name
        parts.append(_record(number, member))
    parts.append(_record(0, Member(name=TRAILER.decode(), mode=0)))
    archive = b"".join(parts)
    return archive + bytes(-len(archive) % 512)


def _record(number: int, member: Member) -> bytes:
    name = member.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(member.mode) else 1
    major, minor = member.device
    fields = (number, member.mode, 0, 0, links, 0, len(member.data), 0, 0, major, minor, len(name), 0)
    head = MAGICS[0] + b"".join(b"%08x" % field for field in fields) + name
    head += bytes(-len(head) % 4)
    return head + member.data + bytes(-len(member.data) % 4)


def read_header(header: bytes) -> tuple[int, int]:
    """Bytes of name and of content that follow a member's 110-byte header.

    Raises:
        CpioError: Not a newc header.
    """
    if len(header) < HEADER_BYTES or header[:6] not in MAGICS:
        raise CpioError("no newc header")
    try:
        size_bytes, name_bytes = int(header[54:62], 16), int(header[94:102], 16)
    except ValueError:
        raise CpioError("a newc header with fields that are no numbers") from None
    if not 0 < name_bytes <= MAX_NAME_BYTES:
        raise CpioError(f"a newc header with a name of {name_bytes} bytes")
    return name_bytes, size_bytes


def walk(data: bytes | mmap.mmap, start: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and end of the content of each member up to the trailer, which comes last.

    Raises:
        CpioError: Cut short, or damaged.
    """
    position = start
    while True:
        name_bytes, size_bytes = read_header(bytes(data[position : position + HEADER_BYTES]))
        name_end = position + HEADER_BYTES + name_bytes
        content = name_end + (-(name_end - start) % 4)
        end = content + size_bytes
        if end > len(data):
            raise CpioError(f"cut short: {len(data)} bytes, a member ends at {end}")
        name = bytes(data[position + HEADER_BYTES : name_end - 1])
        yield name, content, end
        if name == TRAILER:
            return
        position = end + (-(end - start) % 4)
