from __future__ import annotations

from pathlib import Path

from casemate.host.space import find_disk, find_memory


def meminfo(root: Path, text: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(text)
    return root


def test_memory_when_enough_is_free_then_yes_with_huge_pages(tmp_path: Path) -> None:
    root = meminfo(
        tmp_path,
        "MemTotal:  4194304 kB\nMemAvailable: 2097152 kB\nHugePages_Total:  8\nHugePages_Free: 3\nHugepagesize: 2048 kB\n",
    )

    found = find_memory(root)

    assert found.state == "yes"
    assert found.facts == {
        "total_mib": 4096,
        "available_mib": 2048,
        "huge_pages": 8,
        "huge_pages_free": 3,
        "huge_page_kib": 2048,
    }


def test_memory_when_too_little_is_free_then_no_and_needed(tmp_path: Path) -> None:
    found = find_memory(meminfo(tmp_path, "MemTotal: 4194304 kB\nMemAvailable: 102400 kB\n"))

    assert (found.state, found.needed) == ("no", True)
    assert "100 MiB of 4096 MiB are free, 256 MiB are needed" in found.text


def test_disk_when_directory_is_not_there_yet_then_its_parent_is_looked_at(tmp_path: Path) -> None:
    found = find_disk("disk.cache", tmp_path / "a" / "b", needed_mib=1)

    assert found.state == "yes"
    assert found.facts["free_mib"] > 1
    assert not (tmp_path / "a").exists()


def test_disk_when_less_is_free_than_sensible_then_partly(tmp_path: Path) -> None:
    assert find_disk("disk.cache", tmp_path, needed_mib=1 << 40).state == "partly"


def test_disk_when_it_lies_below_a_file_then_no(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    found = find_disk("disk.state", tmp_path / "file" / "state")

    assert (found.state, found.needed) == ("no", True)
    assert "CASEMATE_STATE_ROOT" in found.cure
