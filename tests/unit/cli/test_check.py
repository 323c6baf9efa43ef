"""``casemate check`` without a virtual machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from casemate.cli import main


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that answers as QEMU does; roots of this test alone."""
    monkeypatch.setenv("CASEMATE_STATE_ROOT", str(tmp_path / "state"))
    monkeypatch.setenv("CASEMATE_CACHE", str(tmp_path / "cache"))
    binary = tmp_path / "qemu"
    binary.write_text("#!/bin/sh\necho QEMU emulator version 8.1.2\n")
    binary.chmod(0o755)
    monkeypatch.setenv("CASEMATE_QEMU", str(binary))
    return binary


def test_check_when_all_that_is_needed_is_there_then_status_0_and_a_line_each(
    qemu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check"]) == 0

    printed = capsys.readouterr().out
    assert f"{qemu} 8.1.2" in printed
    assert printed.endswith("sandboxes can start\n")
    assert {line.split()[1] for line in printed.splitlines() if line[0] != " "} >= {
        "accelerator", "kvm", "boot", "vsock", "tap", "cgroup", "memory", "disk.state", "disk.cache", "nested",
        "protection", "numa", "modules", "tool.mkfs.erofs", "tool.virtiofsd", "tool.skopeo",
    }  # fmt: skip


def test_check_when_json_then_the_same_as_a_document(qemu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert document["accelerator"] in ("kvm", "tcg")
    assert document["boot"] is None
    assert {finding["state"] for finding in document["findings"]} <= {"yes", "partly", "no"}


def test_check_when_qemu_is_missing_then_status_1_and_the_cure(
    qemu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qemu.unlink()

    assert main(["check"]) == 1

    printed = capsys.readouterr().out
    assert "-> install qemu-system-x86" in printed
    assert "can't start" in printed
