"""The uncompressed kernel inside a bzImage: a VMM that enters it through PVH spares the guest the unpacking.

Layout as in the kernel's ``Documentation/arch/x86/boot.rst``: the setup header says how many sectors of setup code come
first, then where in the protected-mode code the compressed payload lies.
"""

from __future__ import annotations

import struct

import msgspec

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest import compression, elf
from casemate.guest.compression import Decompress

__all__ = ["BzImage", "extract_vmlinux", "is_bzimage", "parse_bzimage"]

MAX_VMLINUX_BYTES = 512 << 20
"""No kernel is larger; the size comes from a file that may be damaged."""

HEADER_BYTES = 0x260
"""The first bytes of a bzImage that :func:`parse_bzimage` reads, release string apart."""

_PAYLOAD_PROTOCOL = 0x208
_FORMATS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4-legacy"),
)


class BzImage(msgspec.Struct, frozen=True, kw_only=True):
    """What the setup header of a bzImage says.

    Args:
        size_bytes: Length that the file must have at least.
        payload_offset_bytes: Where the compressed kernel starts in the file.
        payload_bytes: Its length with the size word that ends it.
        release: Kernel release (``6.1.0-56-cloud-amd64``), empty when the image does not say.
    """

    size_bytes: int
    payload_offset_bytes: int
    payload_bytes: int
    release: str


def is_bzimage(head: bytes) -> bool:
    """Whether ``head``, the first 0x206 bytes or more of a file, is that of a bzImage."""
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"


def parse_bzimage(data: bytes, *, path: str) -> BzImage:
    """Read the setup header. Does not block.

    Args:
        data: The image, or so much of its start that header and release string are in it (32 KiB).
        path: For the error text.

    Raises:
        InvalidConfigError: No bzImage, or one of a boot protocol before 2.08 (2008).
    """
    head = bytes(data[:HEADER_BYTES])
    if len(head) < HEADER_BYTES or not is_bzimage(head):
        raise InvalidConfigError(f"{path} is not a bzImage: no HdrS in its setup header", path="kernel")
    setup_sectors = head[0x1F1] or 4
    (system_paragraphs,) = struct.unpack_from("<I", head, 0x1F4)
    protocol, version_pointer = (
        struct.unpack_from("<H", head, 0x206)[0],
        struct.unpack_from("<H", head, 0x20E)[0],
    )
    if protocol < _PAYLOAD_PROTOCOL:
        raise InvalidConfigError(
            f"{path} has boot protocol {protocol >> 8}.{protocol & 0xFF:02}, 2.08 or newer is expected",
            path="kernel",
        )
    payload_offset, payload_bytes = struct.unpack_from("<II", head, 0x248)
    start = (setup_sectors + 1) * 512
    version = bytes(data[version_pointer + 0x200 : version_pointer + 0x300]) if version_pointer else b""
    return BzImage(
        size_bytes=start + system_paragraphs * 16,
        payload_offset_bytes=start + payload_offset,
        payload_bytes=payload_bytes,
        release=version.split(b"\0")[0].split(b" ")[0].decode("ascii", "replace"),
    )


def extract_vmlinux(data: bytes, *, path: str, decompress: Decompress | None = None) -> bytes:
    """The vmlinux inside the bzImage ``data``.

    Args:
        data: The whole image.
        path: Where it came from, for error texts.
        decompress: For lz4 and zstd; the native one by default.

    Raises:
        InvalidConfigError: Not a bzImage, cut short, or its payload damaged or not a whole ELF file.
        UnsupportedError: Its payload is compressed in a way that is not known.
    Blocks: for the decompression, 0.1 to 2 s.
    """
    image = parse_bzimage(data, path=path)
    end = image.payload_offset_bytes + image.payload_bytes
    if len(data) < image.size_bytes or len(data) < end:
        raise InvalidConfigError(
            f"{path} is cut short: {len(data)} bytes, its header says {max(image.size_bytes, end)}",
            path="kernel",
        )
    payload = bytes(data[image.payload_offset_bytes : end])
    expected_bytes = int.from_bytes(payload[-4:], "little")
    if not 0 < expected_bytes <= MAX_VMLINUX_BYTES:
        raise InvalidConfigError(
            f"{path} says its kernel is {expected_bytes} bytes when unpacked", path="kernel"
        )
    vmlinux = _unpack(payload, expected_bytes, path=path, decompress=decompress)
    if len(vmlinux) != expected_bytes:
        raise InvalidConfigError(
            f"{path} is damaged: its kernel unpacks to {len(vmlinux)} bytes, {expected_bytes} expected",
            path="kernel",
        )
    try:
        needed = elf.required_bytes(vmlinux)
    except elf.ElfError as exc:
        raise InvalidConfigError(f"{path} does not hold an x86-64 kernel: {exc}", path="kernel") from exc
    if needed > len(vmlinux):
        raise InvalidConfigError(
            f"{path} holds an ELF file of {len(vmlinux)} bytes, {needed} expected", path="kernel"
        )
    return vmlinux


def _unpack(payload: bytes, expected_bytes: int, *, path: str, decompress: Decompress | None) -> bytes:
    name = next((name for magic, name in _FORMATS if payload.startswith(magic)), None)
    if name is None:
        known = ", ".join(name for _, name in _FORMATS)
        raise UnsupportedError(
            f"{path} is compressed in a way that is not known ({payload[:4].hex()}); expected one of {known}",
            capability="kernel compression",
        )
    # gzip ends in the size by itself; after the other formats the kernel's build appends it.
    body = payload if name == "gzip" else payload[:-4]
    try:
        return compression.decompress(body, form=name, max_bytes=expected_bytes, native=decompress)
    except InvalidConfigError as exc:
        raise InvalidConfigError(
            f"{path} is damaged: its {name} payload can't be unpacked: {exc}", path="kernel"
        ) from exc
