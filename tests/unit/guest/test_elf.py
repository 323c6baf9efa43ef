from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.guest import elf
from tests.support.guest_files import make_elf, make_module, make_note, make_vmlinux


def test_find_pvh_entry_of_kernel_with_note_returns_address() -> None:
    kernel = make_elf(
        segments=[(1, b"code"), (4, make_note(b"GNU\0", 3, b"id") + make_note(body=b"\x40\x12\x00\x01"))]
    )

    assert elf.find_pvh_entry(kernel) == 0x01001240


def test_find_pvh_entry_of_kernel_without_note_returns_none() -> None:
    assert elf.find_pvh_entry(make_vmlinux(pvh=False)) is None


def test_find_pvh_entry_when_note_segment_is_cut_raises() -> None:
    kernel = make_elf(segments=[(1, b"code"), (4, make_note())])

    with pytest.raises(elf.ElfError, match="cut short"):
        elf.find_pvh_entry(kernel[: 64 + 2 * 56 + 8])


def test_required_bytes_of_cut_file_says_what_it_had() -> None:
    kernel = make_elf(segments=[(1, bytes(9000))])

    assert elf.required_bytes(kernel[:4096]) == 64 + 56 + 9000


def test_read_sections_of_module_finds_names_and_contents() -> None:
    module = make_module("virtio", "virtio_ring", signed=False)

    found = {section.name: section for section in elf.read_sections(module)}

    info = found[".modinfo"]
    content = module[info.offset_bytes : info.offset_bytes + info.size_bytes]
    assert b"depends=virtio_ring\0" in content
    assert module[found[".BTF"].name_offset_bytes :].startswith(b".BTF\0")


@pytest.mark.parametrize("cut", [10, 100, 300])
def test_read_sections_of_cut_module_raises(cut: int) -> None:
    with pytest.raises(elf.ElfError):
        elf.read_sections(make_module("virtio")[:cut])


def test_read_header_of_other_machine_raises() -> None:
    other = bytearray(make_elf())
    other[18] = 183

    with pytest.raises(elf.ElfError, match="x86-64"):
        elf.required_bytes(bytes(other))


def test_has_interpreter_tells_dynamic_programs() -> None:
    assert elf.has_interpreter(make_elf(segments=[(3, b"/lib64/ld.so\0")]))
    assert not elf.has_interpreter(make_elf(segments=[(1, b"code")]))


@given(st.data())
def test_any_damage_gives_a_result_or_elf_error(data: st.DataObject) -> None:
    module = bytearray(make_module("virtio", "virtio_ring"))
    for _ in range(data.draw(st.integers(1, 8))):
        module[data.draw(st.integers(0, len(module) - 1))] = data.draw(st.integers(0, 255))

    for read in (elf.read_sections, elf.find_pvh_entry, elf.required_bytes):
        try:
            read(bytes(module))
        except elf.ElfError:
            continue
