from __future__ import annotations

import os
from pathlib import Path

import pytest

from casemate.host.tools import Tool, find_tool, parse_version

TOOL = Tool(name="thing", purpose="testing", without="no tests", packages="things")


class Ask:
    """Answers in the program's place and counts."""

    def __init__(self, text: str = "thing version 1.2.3 (tested)") -> None:
        self.text = text
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, path: str, arguments: tuple[str, ...]) -> str:
        self.asked.append((path, arguments))
        return self.text


def program(path: Path, text: str = "#!/bin/sh\necho thing 4.5\n") -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("skopeo version 1.9.3", "1.9.3"),
        ("mke2fs 1.47.0 (5-Feb-2023)", "1.47.0"),
        ("mkfs.erofs 1.5\n", "1.5"),
        ("ip utility, iproute2-6.1.0, libbpf 1.1.2", "6.1.0"),
        ("virtiofsd version 7.2.22 (Debian 1:7.2+dfsg)", "7.2.22"),
        ("nftables v1.0.6 (Lester Gooch #5)", "1.0.6"),
        ("none", ""),
    ],
)
def test_version_then_is_the_first_dotted_number(text: str, version: str) -> None:
    assert parse_version(text) == version


def test_tool_when_there_then_path_and_version_are_told_and_kept(tmp_path: Path) -> None:
    program(tmp_path / "thing")
    ask = Ask()

    found = [find_tool(TOOL, cache_root=tmp_path / "c", search_path=str(tmp_path), ask=ask) for _ in range(2)]

    assert [(one.state, one.facts["version"]) for one in found] == [("yes", "1.2.3")] * 2
    assert ask.asked == [(str(tmp_path / "thing"), ("--version",))]


def test_tool_when_the_program_changed_then_it_is_asked_again(tmp_path: Path) -> None:
    binary = program(tmp_path / "thing")
    find_tool(TOOL, cache_root=tmp_path / "c", search_path=str(tmp_path), ask=Ask())
    os.utime(binary, ns=(1, 1))

    found = find_tool(TOOL, cache_root=tmp_path / "c", search_path=str(tmp_path), ask=Ask("thing 2.0"))

    assert found.facts["version"] == "2.0"


def test_tool_when_cache_is_damaged_then_it_is_asked_again(tmp_path: Path) -> None:
    program(tmp_path / "thing")
    (tmp_path / "tool-versions.json").write_text('{"version": 1, "entries": [{"path": 3}]}')

    assert find_tool(TOOL, cache_root=tmp_path, search_path=str(tmp_path)).facts["version"] == "4.5"


def test_tool_when_missing_then_package_and_loss_are_told(tmp_path: Path) -> None:
    found = find_tool(TOOL, cache_root=tmp_path, search_path=str(tmp_path))

    assert (found.state, found.cure) == ("no", "install things")
    assert "no tests" in found.text


def test_tool_when_outside_path_then_found_elsewhere(tmp_path: Path) -> None:
    binary = program(tmp_path / "elsewhere")
    tool = Tool(name="thing", purpose="p", without="w", packages="k", elsewhere=("/nowhere", str(binary)))

    assert find_tool(tool, cache_root=tmp_path, search_path="").facts["path"] == str(binary)


def test_tool_when_it_says_nothing_of_use_then_there_all_the_same(tmp_path: Path) -> None:
    program(tmp_path / "thing", "#!/bin/sh\nexit 1\n")

    found = find_tool(TOOL, cache_root=tmp_path, search_path=str(tmp_path))

    assert found.state == "yes"
    assert "unknown version" in found.text
