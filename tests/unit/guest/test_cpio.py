from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.guest import cpio

_NAMES = st.text(st.sampled_from("abcé-._"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
_MEMBERS = st.dictionaries(_NAMES, st.tuples(st.binary(max_size=300), st.integers(0, 0o7777)), max_size=8)


def _read_independently(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Written from the format's description alone, sharing nothing with the writer."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        words = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, major, minor, name_size = words[1], words[6], words[9], words[10], words[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += (110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = (mode, archive[at : at + size], (major, minor))
        at += (size + 3) // 4 * 4


@given(_MEMBERS)
def test_write_any_files_then_other_reader_gets_the_same(contents: dict[str, tuple[bytes, int]]) -> None:
    archive = cpio.write(cpio.file(name, data, mode) for name, (data, mode) in contents.items())

    found = _read_independently(archive)

    assert found == {name: (stat.S_IFREG | mode, data, (0, 0)) for name, (data, mode) in contents.items()}
    assert len(archive) % 512 == 0


def test_write_of_nodes_and_directories_keeps_type_and_device() -> None:
    archive = cpio.write(
        [cpio.node("dev/console", 5, 1), cpio.directory("dev"), cpio.symlink("bin", "usr/bin")]
    )

    found = _read_independently(archive)

    assert list(found) == ["bin", "dev", "dev/console"]
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert found["bin"] == (stat.S_IFLNK | 0o777, b"usr/bin", (0, 0))
    assert found["dev"][0] == stat.S_IFDIR | 0o755


def test_write_in_another_order_gives_the_same_bytes() -> None:
    members = [cpio.directory("a"), cpio.file("a/b", b"1"), cpio.file("a-b", b"2"), cpio.file("a.b", b"3")]

    assert cpio.write(members) == cpio.write(reversed(members))


def test_write_then_directory_stands_before_its_content() -> None:
    names = [
        name
        for name, _, _ in cpio.walk(
            cpio.write([cpio.file("a-b", b""), cpio.file("a/b", b""), cpio.directory("a")])
        )
    ]

    assert names == [b"a", b"a/b", b"a-b", b"TRAILER!!!"]


@pytest.mark.parametrize("name", ["", "/etc", "../x", "a/../../x"])
def test_write_of_name_outside_the_root_raises(name: str) -> None:
    with pytest.raises(ValueError, match="not a path below the root"):
        cpio.write([cpio.file(name, b"")])


def test_write_of_a_name_twice_raises() -> None:
    with pytest.raises(ValueError, match="x is given twice"):
        cpio.write([cpio.file("x", b"1"), cpio.file("x", b"2")])


@given(st.integers(1, 600))
def test_walk_of_cut_archive_raises(cut: int) -> None:
    archive = cpio.write([cpio.file("a", bytes(300)), cpio.file("b", bytes(100))])
    whole = len(archive.rstrip(b"\0")) + 1  # up to the trailer's name, which padding follows

    with pytest.raises(cpio.CpioError):
        list(cpio.walk(archive[: max(0, whole - cut)]))


@given(st.binary(max_size=400))
def test_walk_of_any_bytes_ends_or_raises_cpio_error(data: bytes) -> None:
    with pytest.raises(cpio.CpioError):
        list(cpio.walk(data))


def test_cpio_program_where_there_is_one_lists_the_same(tmp_path: Path) -> None:
    tool = shutil.which("cpio") or shutil.which("bsdcpio")
    if tool is None:
        pytest.skip("needs cpio on PATH")
    archive = cpio.write([cpio.directory("d"), cpio.file("d/f", b"text", 0o755)])

    listed = subprocess.run([tool, "-it"], input=archive, capture_output=True, check=True, cwd=tmp_path)

    assert listed.stdout.decode().split() == ["d", "d/f"]
