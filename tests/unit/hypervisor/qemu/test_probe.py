from __future__ import annotations

import os
from pathlib import Path

import pytest

from casemate.errors import HypervisorError, NotFoundError, UnsupportedError
from casemate.hypervisor.qemu.probe import find_qemu, parse_version

BANNER = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022\n"


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Banner:
    def __init__(self, text: str = BANNER) -> None:
        self.text = text
        self.asked: list[str] = []

    def __call__(self, path: str) -> str:
        self.asked.append(path)
        return self.text


def test_version_when_banner_is_qemus_then_is_read() -> None:
    assert parse_version(BANNER) == (7, 2, 22)
    with pytest.raises(HypervisorError, match="hello"):
        parse_version("hello")


def test_find_qemu_when_asked_twice_then_the_program_runs_once(tmp_path: Path) -> None:
    binary = program(tmp_path / "bin" / "qemu")
    banner = Banner()

    first = find_qemu("qemu", cache_root=tmp_path / "c", search_path=str(binary.parent), ask=banner)
    again = find_qemu(str(binary), cache_root=tmp_path / "c", ask=banner)

    assert first == again
    assert first.version == (7, 2, 22)
    assert banner.asked == [str(binary)]


def test_find_qemu_when_binary_changed_then_it_is_asked_anew(tmp_path: Path) -> None:
    binary = program(tmp_path / "qemu")
    find_qemu(str(binary), cache_root=tmp_path / "c", ask=Banner())
    os.utime(binary, ns=(1, 1))
    newer = Banner("QEMU emulator version 10.0.1")

    assert find_qemu(str(binary), cache_root=tmp_path / "c", ask=newer).version == (10, 0, 1)


def test_find_qemu_when_cache_is_damaged_then_it_is_asked_anew(tmp_path: Path) -> None:
    binary = program(tmp_path / "qemu")
    (tmp_path / "qemu-probe.json").write_text("{")

    assert find_qemu(str(binary), cache_root=tmp_path, ask=Banner()).version == (7, 2, 22)


def test_find_qemu_when_cache_can_not_be_written_then_answers_all_the_same(tmp_path: Path) -> None:
    binary = program(tmp_path / "qemu")
    (tmp_path / "file").touch()

    assert find_qemu(str(binary), cache_root=tmp_path / "file" / "c", ask=Banner()).version == (7, 2, 22)


@pytest.mark.parametrize("name", ["qemu-none", "/nowhere/qemu", "./qemu-none"])
def test_find_qemu_when_missing_then_names_the_package(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="qemu-system-x86"):
        find_qemu(name, cache_root=tmp_path, search_path=str(tmp_path))


def test_find_qemu_when_file_is_not_executable_then_is_missing(tmp_path: Path) -> None:
    (tmp_path / "qemu").touch()

    with pytest.raises(NotFoundError):
        find_qemu("qemu", cache_root=tmp_path, search_path=str(tmp_path))


def test_find_qemu_when_too_old_then_is_refused_also_from_the_cache(tmp_path: Path) -> None:
    binary = program(tmp_path / "qemu")
    banner = Banner("QEMU emulator version 4.2.1")

    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"4\.2\.1") as caught:
            find_qemu(str(binary), cache_root=tmp_path, ask=banner)
        assert caught.value.capability == "qemu"
    assert len(banner.asked) == 1


def test_find_qemu_when_program_fails_then_its_stderr_is_told(tmp_path: Path) -> None:
    binary = program(tmp_path / "qemu", "#!/bin/sh\necho broken library >&2\nexit 3\n")

    with pytest.raises(HypervisorError, match="status 3: broken library"):
        find_qemu(str(binary), cache_root=tmp_path)
