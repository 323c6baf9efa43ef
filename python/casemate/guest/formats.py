"""Checks of a user's own kernel, initrd or disk image, before anything starts: is it there, is it one, is it whole.

The files are mapped, not read; compressed archives are unpacked into nothing or walked frame by frame.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from casemate.errors import HostError, InvalidConfigError
from casemate.guest import cpio, elf, vmlinux

__all__ = ["KernelFile", "check_disk_image", "check_initrd", "check_kernel", "open_mapped"]

_CHUNK_BYTES = 1 << 20
_IKCONFIG = b"IKCFG_ST\x1f\x8b"
_MAX_CONFIG_BYTES = 4 << 20
_ZSTD, _LZ4_LEGACY = b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"


class KernelFile(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel file that was found whole.

    Args:
        form: ``vmlinux`` or ``bzimage``.
        release: Kernel release, empty when the file does not say.
        config: The configuration that is embedded in it (CONFIG_IKCONFIG), empty when there is none.
    """

    form: str
    release: str
    config: str = ""


@contextlib.contextmanager
def open_mapped(path: Path, *, field: str) -> Iterator[mmap.mmap]:
    """The content of the regular file ``path``, mapped: a slice of it is a copy, so nothing outlives the mapping.

    Raises:
        InvalidConfigError: Missing, not a regular file, or empty; ``path`` of the error is ``field``.
        HostError: It can't be opened.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidConfigError(f"{field} {path} is not a regular file", path=field)
        if status.st_size == 0:
            raise InvalidConfigError(f"{field} {path} is empty", path=field)
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield mapped
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise InvalidConfigError(f"{field} {path} does not exist", path=field) from exc
    except OSError as exc:
        if isinstance(exc, HostError):
            raise
        raise HostError(
            f"{field} {path} can't be read: {os.strerror(exc.errno or 0)}",
            errno=exc.errno or 0,
            target=str(path),
        ) from exc


def check_kernel(path: Path) -> KernelFile:
    """Check that ``path`` is a whole kernel that QEMU can boot directly.

    Raises:
        InvalidConfigError: Missing, cut short, no kernel, or a vmlinux without PVH entry; ``path`` is ``kernel``.
        HostError: It can't be read.
    Blocks: for reading the file, tens of milliseconds.
    """
    with open_mapped(path, field="kernel") as data:
        if vmlinux.is_bzimage(data[:0x300]):
            return _check_bzimage(data, path)
        if data[:4] == b"\x7fELF":
            return _check_vmlinux(data, path)
        raise InvalidConfigError(
            f"kernel {path} is not a kernel: a bzImage (HdrS) or an ELF vmlinux is expected, it starts with"
            f" {data[:4].hex()}",
            path="kernel",
        )


def _check_bzimage(data: mmap.mmap, path: Path) -> KernelFile:
    image = vmlinux.parse_bzimage(data[: 64 << 10], path=str(path))
    if len(data) < image.size_bytes:
        raise InvalidConfigError(
            f"kernel {path} is cut short: {len(data)} bytes, its header says {image.size_bytes}",
            path="kernel",
        )
    return KernelFile(form="bzimage", release=image.release)


def _check_vmlinux(data: mmap.mmap, path: Path) -> KernelFile:
    try:
        needed = elf.required_bytes(data)
        if needed > len(data):
            raise elf.ElfError(f"cut short: {len(data)} bytes, {needed} expected")
        entry = elf.find_pvh_entry(data)
    except elf.ElfError as exc:
        raise InvalidConfigError(
            f"kernel {path} is not a whole x86-64 vmlinux: {exc}", path="kernel"
        ) from exc
    if entry is None:
        raise InvalidConfigError(
            f"kernel {path} has no PVH entry (built without CONFIG_PVH); use its bzImage instead",
            path="kernel",
        )
    found = re.search(rb"Linux version (\d[!-~]*)", data)
    release = found.group(1).decode("ascii", "replace") if found else ""
    return KernelFile(form="vmlinux", release=release, config=_embedded_config(data))


def _embedded_config(data: mmap.mmap) -> str:
    found = re.search(re.escape(_IKCONFIG), data)
    if found is None:
        return ""
    import zlib

    start = found.start() + 8
    stream = zlib.decompressobj(wbits=31)
    try:
        return stream.decompress(data[start : start + _MAX_CONFIG_BYTES], _MAX_CONFIG_BYTES).decode(
            "utf-8", "replace"
        )
    except zlib.error:
        return ""  # the marker may be a string of code that reads such files; then there is no configuration


def check_initrd(path: Path) -> None:
    """Check that ``path`` is one or more whole initrd archives: newc cpio, bare or packed by gzip, xz, zstd or lz4 (legacy).

    Raises:
        InvalidConfigError: Missing, cut short, damaged or of another form; ``path`` is ``initrd``.
        HostError: It can't be read.
    Blocks: for reading it, and unpacking when gzip or xz: about 0.3 s for 30 MB.
    """
    with open_mapped(path, field="initrd") as data:
        position = 0
        try:
            while position < len(data):
                if data[position] == 0:  # padding between two archives, and after the last
                    position = _skip_zeros(data, position)
                    continue
                position = _segment_end(data, position)
        except (ValueError, EOFError) as exc:
            if isinstance(exc, InvalidConfigError):
                raise
            raise InvalidConfigError(f"initrd {path} is damaged: {exc}", path="initrd") from exc


def _skip_zeros(data: mmap.mmap, position: int) -> int:
    while position < len(data) and data[position] == 0:
        block = data[position : position + _CHUNK_BYTES]
        rest = block.lstrip(b"\0")
        position += len(block) - len(rest)
    return position


def _segment_end(data: mmap.mmap, start: int) -> int:
    magic = data[start : start + 6]
    if magic in cpio.MAGICS:
        end = start
        for _, _, member_end in cpio.walk(data, start):
            end = member_end
        return end
    if magic.startswith(b"\x1f\x8b"):
        return _gzip_end(data, start)
    if magic == b"\xfd7zXZ\x00":
        return _xz_end(data, start)
    if magic.startswith(_ZSTD):
        return _zstd_end(data, start)
    if magic.startswith(_LZ4_LEGACY):
        return _lz4_end(data, start)
    raise ValueError(
        f"at byte {start} a newc cpio, gzip, xz, zstd or lz4 (legacy) archive is expected, not {magic.hex()}"
    )


def _gzip_end(data: mmap.mmap, start: int) -> int:
    import zlib

    stream = zlib.decompressobj(wbits=31)
    position = start
    try:
        while not stream.eof and position < len(data):
            chunk = stream.unconsumed_tail or data[position : position + _CHUNK_BYTES]
            fresh = 0 if stream.unconsumed_tail else len(chunk)
            stream.decompress(chunk, _CHUNK_BYTES * 4)
            position += fresh
        while not stream.eof and stream.unconsumed_tail:
            stream.decompress(stream.unconsumed_tail, _CHUNK_BYTES * 4)
    except zlib.error as exc:
        raise ValueError(f"gzip: {exc}") from exc
    if not stream.eof:
        raise EOFError("gzip data is cut short")
    return position - len(stream.unused_data)


def _xz_end(data: mmap.mmap, start: int) -> int:
    import lzma

    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    position = start
    try:
        while not stream.eof:
            chunk = data[position : position + _CHUNK_BYTES] if stream.needs_input else b""
            if stream.needs_input and not chunk:
                raise EOFError("xz data is cut short")
            stream.decompress(chunk, _CHUNK_BYTES * 4)
            position += len(chunk)
    except lzma.LZMAError as exc:
        raise ValueError(f"xz: {exc}") from exc
    return position - len(stream.unused_data)


def _need(data: mmap.mmap, end: int, what: str) -> int:
    if end > len(data):
        raise EOFError(f"{what} is cut short: {len(data)} bytes, {end} expected")
    return end


def _zstd_end(data: mmap.mmap, start: int) -> int:
    """Frame layout as in RFC 8878, section 3.1.1; the content of blocks is not looked at."""
    position = _need(data, start + 5, "zstd data")
    descriptor = data[start + 4]
    single = bool(descriptor & 0x20)
    size_bytes = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    position += (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + size_bytes
    last = False
    while not last:
        _need(data, position + 3, "zstd data")
        header = int.from_bytes(data[position : position + 3], "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == 3:
            raise ValueError("zstd: a block of reserved type")
        position = _need(data, position + 3 + (1 if kind == 1 else length), "zstd data")
    return _need(data, position + (4 if descriptor & 4 else 0), "zstd data")


def _lz4_end(data: mmap.mmap, start: int) -> int:
    position = start + 4
    while position + 4 <= len(data):
        word = data[position : position + 4]
        if word == b"\0\0\0\0" or word[:4] in (_ZSTD, b"0707") or word.startswith(b"\x1f\x8b\x08"):
            break
        if word != _LZ4_LEGACY:
            position = _need(data, position + int.from_bytes(word, "little"), "lz4 data")
        position += 4
    if position == start + 4:
        raise EOFError("lz4 data is cut short")
    return position


def check_disk_image(path: Path) -> str:
    """Check that ``path`` is a disk image with a known file system or partition table, and return which.

    Raises:
        InvalidConfigError: Missing, cut short, or none of erofs, ext4, squashfs, xfs, gpt, mbr, qcow2; ``path`` is ``image``.
        HostError: It can't be read.
    """
    with open_mapped(path, field="image") as data:
        head = data[:4096]
        form, needed = _disk_form(head.ljust(4096, b"\0"))
        if not form:
            raise InvalidConfigError(
                f"image {path} is no disk image that is known: erofs, ext4, squashfs, xfs, a GPT or MBR partition"
                " table, or qcow2 is expected",
                path="image",
            )
        if needed > len(data):
            raise InvalidConfigError(
                f"image {path} is cut short: {len(data)} bytes, its {form} header says {needed}", path="image"
            )
        return form


def _disk_form(head: bytes) -> tuple[str, int]:
    """Name of the form, and bytes that the image has at least."""
    if head[1024:1028] == b"\xe2\xe1\xf5\xe0":
        (blocks,) = struct.unpack_from("<I", head, 1024 + 36)
        return "erofs", blocks << min(head[1024 + 12], 16)
    if head[1080:1082] == b"\x53\xef":
        (blocks,) = struct.unpack_from("<I", head, 1024 + 4)
        (log_size,) = struct.unpack_from("<I", head, 1024 + 24)
        return "ext4", blocks << 10 + min(log_size, 6)
    if head[:4] == b"hsqs":
        return "squashfs", int(struct.unpack_from("<Q", head, 40)[0])
    if head[:4] == b"XFSB":
        block_bytes, blocks = struct.unpack_from(">IQ", head, 4)
        return "xfs", block_bytes * blocks
    if head[:4] == b"QFI\xfb":
        return "qcow2", 512
    if head[512:520] == b"EFI PART":
        (backup,) = struct.unpack_from("<Q", head, 512 + 32)
        return "gpt", (backup + 1) * 512
    if head[510:512] == b"\x55\xaa":
        return "mbr", 512
    return "", 0
