"""A guest of a few bytes: a PVH kernel that writes a text to the serial port and then halts, or resets the machine.

It boots in a fraction of a second, so that what concerns the VMM is tested without Linux.
"""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["write_tiny_kernel"]

_LOAD_ADDRESS = 0x100000
_PHYS32_ENTRY = 18
_HALT = b"\xf4\xeb\xfd"  # hlt; jump back to it
_HEAD_BYTES = 64 + 2 * 56


def write_tiny_kernel(path: Path, text: str, *, reset: bool = False) -> Path:
    """Write the kernel; with ``reset`` it ends by a triple fault, which the machine answers with a reset."""
    note = struct.pack("<III4sQ", 4, 8, _PHYS32_ENTRY, b"Xen\0", 0)  # its address is put in below
    code_offset = _HEAD_BYTES + len(note)
    entry = _LOAD_ADDRESS + code_offset
    note = note[:-8] + struct.pack("<Q", entry)
    # mov esi, message; mov dx, 0x3f8; next: lodsb; test al, al; jz end; out dx, al; jmp next
    loop = b"\x66\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8"
    empty_idt_bytes = bytes(6)
    tail_bytes = len(b"\x0f\x01\x1d" + bytes(4) + b"\xcc") if reset else len(_HALT)
    data_address = entry + 5 + len(loop) + tail_bytes
    # lidt [empty]; int3: no handler, no handler for that: the processor gives up
    tail = b"\x0f\x01\x1d" + struct.pack("<I", data_address) + b"\xcc" if reset else _HALT
    code = b"\xbe" + struct.pack("<I", data_address + len(empty_idt_bytes)) + loop + tail
    body = note + code + empty_idt_bytes + text.encode() + b"\0"
    size = _HEAD_BYTES + len(body)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 0x1000)
    at = _LOAD_ADDRESS + _HEAD_BYTES
    notes = struct.pack("<IIQQQQQQ", 4, 4, _HEAD_BYTES, at, at, len(note), len(note), 4)
    path.write_bytes(header + load + notes + body)
    return path
