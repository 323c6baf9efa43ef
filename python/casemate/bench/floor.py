"""The floor of a start: the same VMM, machine, kernel and memory, and an init that prints one byte and powers off.

Its initrd holds that init alone, and the machine has no device that it does not need.
"""

from __future__ import annotations

import struct

__all__ = ["BYTE", "byte_program", "init_program"]

BYTE = b"\x06"
"""What the init prints; no kernel message has it."""

_BASE = 0x400000
_HEADERS = 64 + 56


def init_program() -> bytes:
    """A static x86-64 program: ``write(1, BYTE, 1)``, then ``reboot(POWER_OFF)``. Does not block.

    Source: Linux ``syscall_64.tbl`` (write 1, reboot 169) and ``reboot(2)``.
    """
    power_off = bytes.fromhex(
        "b8a9000000"  # mov eax, 169 (reboot)
        "bfaddee1fe"  # mov edi, 0xfee1dead
        "be69191228"  # mov esi, 672274793
        "badcfe2143"  # mov edx, 0x4321fedc (power off)
        "4531d2"  # xor r10d, r10d
        "0f05"  # syscall
        "ebfe"  # jmp to itself: the machine ends before
    )
    return byte_program(power_off)


def byte_program(ending: bytes) -> bytes:
    """A static x86-64 ELF program that writes BYTE to its standard output, then runs the machine code ``ending``.

    Source: System V ABI, «ELF Header» and «Program Header».
    """
    writing = bytes.fromhex(
        "b801000000"  # mov eax, 1 (write)
        "bf01000000"  # mov edi, 1
        "488d35"  # lea rsi, [rip + displacement]
    )
    rest = bytes.fromhex(
        "ba01000000"  # mov edx, 1
        "0f05"  # syscall
    )
    # The displacement counts from behind itself to the byte, which stands behind all code.
    code = writing + struct.pack("<i", len(rest) + len(ending)) + rest + ending + BYTE
    size = _HEADERS + len(code)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01" + bytes(9),
        2,  # an executable
        62,  # for x86-64
        1,
        _BASE + _HEADERS,
        64,
        0,
        0,
        64,
        56,
        1,
        0,
        0,
        0,
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return head + segment + code
