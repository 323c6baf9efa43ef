from __future__ import annotations

import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from casemate.errors import HostError, InvalidConfigError
from casemate.guest import cpio, formats
from tests.support.guest_files import make_bzimage, make_elf, make_vmlinux

ARCHIVE = cpio.write([cpio.directory("dev"), cpio.file("init", os.urandom(3000), 0o755)])


def _zstd(content: bytes) -> bytes:
    """A zstd frame of raw blocks with a checksum's place."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x04, 0x58])
    blocks = [content[at : at + 1000] for at in range(0, len(content), 1000)]
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        frame += (len(block) << 3 | last).to_bytes(3, "little") + block
    return frame + b"sum!"


def _lz4(content: bytes) -> bytes:
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(content)) + content


PACKED = {
    "cpio": ARCHIVE,
    "gzip": gzip.compress(ARCHIVE),
    "xz": lzma.compress(ARCHIVE, check=lzma.CHECK_CRC32),
    "zstd": _zstd(ARCHIVE),
    "lz4": _lz4(ARCHIVE),
    "two": ARCHIVE + bytes(512) + gzip.compress(ARCHIVE),
}


def _write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("form", PACKED)
def test_check_initrd_that_is_whole_passes(form: str, tmp_path: Path) -> None:
    formats.check_initrd(_write(tmp_path, PACKED[form]))


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("part", [0.2, 0.7])
def test_check_initrd_that_is_cut_says_so_before_anything_starts(
    form: str, part: float, tmp_path: Path
) -> None:
    path = _write(tmp_path, PACKED[form][: int(len(PACKED[form]) * part)])

    with pytest.raises(InvalidConfigError, match=f"initrd {path} is damaged") as caught:
        formats.check_initrd(path)
    assert caught.value.path == "initrd"


def test_check_initrd_whose_gzip_is_damaged_raises(tmp_path: Path) -> None:
    damaged = bytearray(PACKED["gzip"])
    damaged[len(damaged) // 2] ^= 0xFF

    with pytest.raises(InvalidConfigError, match="gzip"):
        formats.check_initrd(_write(tmp_path, bytes(damaged)))


def test_check_initrd_of_another_form_names_those_expected(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidConfigError, match=r"cpio, gzip, xz, zstd or lz4 \(legacy\) archive is expected"
    ):
        formats.check_initrd(_write(tmp_path, b"plain text"))


def test_check_kernel_of_vmlinux_returns_form_and_release(tmp_path: Path) -> None:
    found = formats.check_kernel(_write(tmp_path, make_vmlinux("6.6.1-own")))

    assert (found.form, found.release, found.config) == ("vmlinux", "6.6.1-own", "")


def test_check_kernel_with_embedded_configuration_returns_it(tmp_path: Path) -> None:
    config = b"CONFIG_EROFS_FS=y\n"
    text = b"Linux version 6.6.1 (a)\n" + b"IKCFG_ST" + gzip.compress(config) + b"IKCFG_ED"
    kernel = make_vmlinux()
    kernel = make_elf(segments=[(1, text), (4, kernel[kernel.index(b"\x04\0\0\0\x04\0\0\0\x12") :][:20])])

    assert formats.check_kernel(_write(tmp_path, kernel)).config == config.decode()


def test_check_kernel_of_bzimage_returns_form_and_release(tmp_path: Path) -> None:
    found = formats.check_kernel(_write(tmp_path, make_bzimage(make_vmlinux(), release="6.1.9-x")))

    assert (found.form, found.release) == ("bzimage", "6.1.9-x")


@pytest.mark.parametrize("kernel", [make_vmlinux(), make_bzimage(make_vmlinux(filler=100_000), form="gzip")])
def test_check_kernel_that_is_cut_says_both_lengths(kernel: bytes, tmp_path: Path) -> None:
    path = _write(tmp_path, kernel[: len(kernel) * 3 // 4 - 600])

    with pytest.raises(InvalidConfigError, match="cut short") as caught:
        formats.check_kernel(path)
    assert str(path) in str(caught.value)
    assert caught.value.path == "kernel"


def test_check_kernel_without_pvh_entry_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="CONFIG_PVH"):
        formats.check_kernel(_write(tmp_path, make_vmlinux(pvh=False)))


def test_check_kernel_of_text_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match=r"a bzImage \(HdrS\) or an ELF vmlinux is expected"):
        formats.check_kernel(_write(tmp_path, b"#!/bin/sh\n"))


def test_check_of_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match=f"kernel {tmp_path}/none does not exist"):
        formats.check_kernel(tmp_path / "none")


def test_check_of_empty_file_says_empty(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="is empty"):
        formats.check_initrd(_write(tmp_path, b""))


def test_check_of_directory_or_pipe_does_not_open_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InvalidConfigError, match="not a regular file"):
            formats.check_kernel(path)


def test_check_of_path_through_a_loop_is_a_host_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(HostError, match="can't be read"):
        formats.check_kernel(tmp_path / "loop")


def _erofs(blocks: int) -> bytes:
    head = bytearray(4096)
    head[1024:1028] = b"\xe2\xe1\xf5\xe0"
    head[1036] = 12
    struct.pack_into("<I", head, 1024 + 36, blocks)
    return bytes(head)


def _ext4(blocks: int) -> bytes:
    head = bytearray(4096)
    head[1080:1082] = b"\x53\xef"
    struct.pack_into("<I", head, 1024 + 4, blocks)
    struct.pack_into("<I", head, 1024 + 24, 2)
    return bytes(head)


@pytest.mark.parametrize(("make", "form"), [(_erofs, "erofs"), (_ext4, "ext4")])
def test_check_disk_image_knows_form_and_length(
    make: Callable[[int], bytes], form: str, tmp_path: Path
) -> None:
    assert formats.check_disk_image(_write(tmp_path, make(1))) == form
    with pytest.raises(InvalidConfigError, match=f"cut short: 4096 bytes, its {form} header says 8192"):
        formats.check_disk_image(_write(tmp_path, make(2)))


def test_check_disk_image_with_partitions_passes(tmp_path: Path) -> None:
    table = bytearray(4096)
    table[510:512] = b"\x55\xaa"

    assert formats.check_disk_image(_write(tmp_path, bytes(table))) == "mbr"


def test_check_disk_image_of_zeros_names_known_forms(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="erofs, ext4, squashfs"):
        formats.check_disk_image(_write(tmp_path, bytes(8192)))
