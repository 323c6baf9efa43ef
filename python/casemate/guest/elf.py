"""What is needed of ELF: is a file whole, has a kernel a PVH entry, what does a module say of itself.

Not a general reader: 64-bit little-endian x86-64 only. Every length and offset is checked against the data before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

import msgspec

__all__ = ["ElfError", "Section", "find_pvh_entry", "has_interpreter", "read_sections", "required_bytes"]

PVH_NOTE_TYPE = 18
"""XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit entry point that a VMM may jump to without firmware."""

_MACHINE_X86_64 = 62
_SEGMENT_NOTE, _SEGMENT_INTERPRETER = 4, 3
_SECTION_NO_BITS = 8
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")

Data = bytes | bytearray | mmap.mmap


class ElfError(ValueError):
    """The data is no x86-64 ELF file, or not a whole one; the text says what was expected."""


class Section(msgspec.Struct, frozen=True):
    """One section: where it lies in the file and where its name lies in the file."""

    name: str
    offset_bytes: int
    size_bytes: int
    name_offset_bytes: int


class _Header(msgspec.Struct, frozen=True):
    program_offset: int
    section_offset: int
    program_count: int
    section_count: int
    section_names: int


def _read_header(data: Data) -> _Header:
    if len(data) < _HEADER.size:
        raise ElfError(f"{len(data)} bytes, too short for an ELF header")
    ident, _, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = (
        _HEADER.unpack_from(data)
    )
    if ident[:4] != b"\x7fELF":
        raise ElfError("no ELF magic")
    if ident[4:6] != b"\x02\x01" or machine != _MACHINE_X86_64:
        raise ElfError("not a 64-bit x86-64 ELF file")
    if (phnum and phentsize != _PROGRAM.size) or (shnum and shentsize != _SECTION.size):
        raise ElfError("header tables of unknown entry size")
    if phnum and phoff + phnum * _PROGRAM.size > len(data):
        raise ElfError("cut short within the program headers")
    return _Header(phoff, shoff, phnum, shnum, shstrndx)


def _programs(data: Data, header: _Header) -> Iterator[tuple[int, int, int]]:
    for index in range(header.program_count):
        kind, _, offset, _, _, size, _, _ = _PROGRAM.unpack_from(
            data, header.program_offset + index * _PROGRAM.size
        )
        yield kind, offset, size


def required_bytes(data: Data) -> int:
    """Length in bytes that the file must have by its own program headers; needs only its first page.

    Raises:
        ElfError: No x86-64 ELF header, or cut short before its program headers end.
    """
    header = _read_header(data)
    return max((offset + size for _, offset, size in _programs(data, header)), default=_HEADER.size)


def has_interpreter(data: Data) -> bool:
    """Whether the program needs a dynamic linker, so can't be PID 1 of a bare initrd. Raises ElfError."""
    header = _read_header(data)
    return any(kind == _SEGMENT_INTERPRETER for kind, _, _ in _programs(data, header))


def find_pvh_entry(data: Data) -> int | None:
    """Physical address of the PVH entry point, None when the kernel has none.

    Raises:
        ElfError: No whole x86-64 ELF file.
    """
    header = _read_header(data)
    for kind, offset, size in _programs(data, header):
        if kind != _SEGMENT_NOTE:
            continue
        if offset + size > len(data):
            raise ElfError(f"cut short: {len(data)} bytes, a note segment ends at {offset + size}")
        for name, note, body in _notes(data[offset : offset + size]):
            if name == b"Xen" and note == PVH_NOTE_TYPE and len(body) in (4, 8):
                return int.from_bytes(body, "little")
    return None


def _notes(segment: Data) -> Iterator[tuple[bytes, int, bytes]]:
    position = 0
    while position + 12 <= len(segment):
        name_size, body_size, note = struct.unpack_from("<III", segment, position)
        body_start = position + 12 + (name_size + 3 & ~3)
        if body_start + body_size > len(segment):
            return
        name = bytes(segment[position + 12 : position + 12 + name_size]).rstrip(b"\0")
        yield name, note, bytes(segment[body_start : body_start + body_size])
        position = body_start + (body_size + 3 & ~3)


def read_sections(data: Data) -> tuple[Section, ...]:
    """The named sections of a kernel module.

    Raises:
        ElfError: No x86-64 ELF file, or cut short.
    """
    header = _read_header(data)
    if header.section_offset + header.section_count * _SECTION.size > len(data):
        raise ElfError("cut short before the section headers end")
    if header.section_names >= header.section_count:
        raise ElfError("no section names")
    rows = [
        _SECTION.unpack_from(data, header.section_offset + index * _SECTION.size)
        for index in range(header.section_count)
    ]
    _, _, _, _, names_offset, names_size, *_ = rows[header.section_names]
    names = bytes(data[names_offset : names_offset + names_size])
    sections = []
    for name_index, kind, _, _, offset, size, *_ in rows:
        if kind != _SECTION_NO_BITS and offset + size > len(data):
            raise ElfError(f"cut short: {len(data)} bytes, a section ends at {offset + size}")
        end = names.find(b"\0", name_index)
        name = names[name_index : end if end >= 0 else len(names)].decode("ascii", "replace")
        sections.append(Section(name, offset, size, names_offset + name_index))
    return tuple(sections)
