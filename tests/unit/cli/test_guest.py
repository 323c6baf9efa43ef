from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from casemate.cli import main
from casemate.guest import assets, cpio
from tests.support.guest_files import make_elf, make_vmlinux, write_fake_apt


@pytest.fixture(autouse=True)
def _installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent, a cache and an apt of this test alone."""
    agent = tmp_path / "agent"
    agent.write_bytes(make_elf(segments=[(1, b"agent")]))
    write_fake_apt(tmp_path / "bin", ["6.1.0-56-cloud-amd64", "6.12.117+deb12-cloud-amd64"])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CASEMATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "agent_path", lambda: agent)


def test_guest_build_prints_what_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "build", "--kernel", "6.1", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["kernel_release"] == "6.1.0-56-cloud-amd64"
    assert Path(found["initrd"]).stat().st_size == found["initrd_bytes"]
    assert "erofs" in found["modules"]


def test_guest_list_shows_what_each_kernel_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    main(["guest", "build"])
    main(["guest", "build", "--kernel", "6.12", "--machine", "microvm"])
    capsys.readouterr()

    assert main(["guest", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["guest", "list"]) == 0
    text = capsys.readouterr().out

    assert [(kernel["release"], kernel["stands_for"]) for kernel in found["kernels"]] == [
        ("6.12.117+deb12-cloud-amd64", ["6.12", "auto"])
    ]
    assert sorted(initrd["machine"] for initrd in found["initrds"]) == ["microvm", "q35"]
    assert "6.12 auto" in text


def test_guest_list_of_empty_cache_prints_empty_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "list", "--json"]) == 0

    assert json.loads(capsys.readouterr().out) == {"kernels": [], "initrds": []}


def test_guest_show_of_own_files_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(make_vmlinux("6.6.6"))
    initrd.write_bytes(cpio.write([cpio.file("init", b"x")]))

    assert main(["guest", "show", "--kernel", str(kernel), "--initrd", str(initrd)]) == 0

    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert shown["kernel_release"] == "6.6.6"
    assert shown["agent"] == "unknown"


def test_guest_show_of_missing_kernel_fails_with_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "show", "--kernel", "/no/such"]) == 1

    assert "kernel /no/such does not exist" in capsys.readouterr().err
