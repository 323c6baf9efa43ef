from __future__ import annotations

import pytest

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest import vmlinux
from tests.support.guest_files import make_bzimage, make_elf, make_vmlinux


@pytest.mark.parametrize("form", ["gzip", "xz"])
def test_extract_vmlinux_of_bzimage_returns_kernel(form: str) -> None:
    kernel = make_vmlinux()

    assert vmlinux.extract_vmlinux(make_bzimage(kernel, form=form), path="vmlinuz") == kernel


@pytest.mark.parametrize(
    ("magic", "form"), [(b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4-legacy")]
)
def test_extract_vmlinux_when_zstd_or_lz4_hands_payload_without_its_size_word(
    magic: bytes, form: str
) -> None:
    kernel = make_vmlinux()
    image = make_bzimage(kernel, form="four-bytes").replace(b"four", magic)
    asked = []

    def native(data: bytes, *, format: str, max_bytes: int) -> bytes:
        asked.append((data, format, max_bytes))
        return kernel

    assert vmlinux.extract_vmlinux(image, path="vmlinuz", decompress=native) == kernel
    assert asked == [(magic + b"-bytes", form, len(kernel))]


def test_parse_bzimage_reads_release_and_length() -> None:
    image = make_bzimage(make_vmlinux(), release="6.1.0-56-cloud-amd64")

    parsed = vmlinux.parse_bzimage(image, path="vmlinuz")

    assert parsed.release == "6.1.0-56-cloud-amd64"
    assert parsed.size_bytes == len(image)


def test_extract_vmlinux_of_other_file_names_it() -> None:
    with pytest.raises(InvalidConfigError, match=r"/boot/x is not a bzImage") as caught:
        vmlinux.extract_vmlinux(bytes(4096), path="/boot/x")
    assert caught.value.path == "kernel"


def test_extract_vmlinux_when_cut_short_says_both_lengths() -> None:
    image = make_bzimage(make_vmlinux())

    with pytest.raises(InvalidConfigError, match=f"{len(image) - 100} bytes, its header says {len(image)}"):
        vmlinux.extract_vmlinux(image[:-100], path="vmlinuz")


def test_extract_vmlinux_when_payload_damaged_raises() -> None:
    image = bytearray(make_bzimage(make_vmlinux()))
    image[2048 + 64 + 40] ^= 0xFF

    with pytest.raises(InvalidConfigError, match="damaged"):
        vmlinux.extract_vmlinux(bytes(image), path="vmlinuz")


def test_extract_vmlinux_when_size_word_disagrees_raises() -> None:
    kernel = make_vmlinux()
    image = make_bzimage(kernel)
    wrong = image.replace(len(kernel).to_bytes(4, "little"), (len(kernel) + 1).to_bytes(4, "little"))

    with pytest.raises(
        InvalidConfigError, match=f"unpacks to {len(kernel)} bytes, {len(kernel) + 1} expected"
    ):
        vmlinux.extract_vmlinux(wrong, path="vmlinuz")


def test_extract_vmlinux_when_size_word_is_absurd_raises_before_unpacking() -> None:
    kernel = make_vmlinux()
    image = make_bzimage(kernel).replace(len(kernel).to_bytes(4, "little"), b"\xff\xff\xff\xff")

    with pytest.raises(InvalidConfigError, match="4294967295 bytes when unpacked"):
        vmlinux.extract_vmlinux(image, path="vmlinuz")


def test_extract_vmlinux_when_compression_unknown_names_those_known() -> None:
    with pytest.raises(UnsupportedError, match="gzip, xz, zstd, lz4-legacy"):
        vmlinux.extract_vmlinux(make_bzimage(make_elf(), form="BZh9"), path="vmlinuz")


def test_extract_vmlinux_when_payload_is_no_elf_raises() -> None:
    with pytest.raises(InvalidConfigError, match="does not hold an x86-64 kernel"):
        vmlinux.extract_vmlinux(make_bzimage(b"text" * 100), path="vmlinuz")
