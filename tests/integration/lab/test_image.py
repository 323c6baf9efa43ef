"""Making the lab's image fails: what is said, and what is left."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tests.lab import LabError
from tests.lab.image import ensure_image, explain, require_space, run_group
from tests.support.guest_files import write_fake_apt

RELEASE = "6.12.9-cloud-amd64"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in front of PATH, with an apt that has one kernel."""
    directory = tmp_path / "bin"
    write_fake_apt(directory, [RELEASE])
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def write_mmdebstrap(tools: Path, script: str) -> None:
    path = tools / "mmdebstrap"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(tmp_path: Path) -> None:
    ensure_image(tmp_path / "cache", tmp_path / "kernels", timeout_factor=1, say=lambda text: None)


@pytest.mark.root
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'E: Unable to locate package qemu-system-x86' >&2; exit 25",
            "a package is gone from the archive: run apt-get update",
        ),
        (
            "echo 'E: Failed to fetch http://x/q.deb  404  Not Found' >&2; exit 25",
            "a package is gone from the archive: run apt-get update",
        ),
        (
            "echo 'mke2fs: No space left on device' >&2; exit 25",
            "ran out of disk space: make room, or name another directory in CASEMATE_LAB_CACHE",
        ),
        ("echo 'E: Could not connect to archive' >&2; exit 25", "the package archive can't be reached"),
        ("echo boom >&2; exit 3", "mmdebstrap failed: boom"),
    ],
    ids=["unknown package", "version gone", "disk full", "offline", "other"],
)
def test_ensure_image_when_packages_cannot_be_had_then_says_why_and_leaves_nothing(
    tools: Path, tmp_path: Path, script: str, message: str
) -> None:
    write_mmdebstrap(tools, script)
    with pytest.raises(LabError, match=message):
        make(tmp_path)
    assert not list((tmp_path / "cache/tmp").iterdir())
    assert not (tmp_path / "cache/images").exists()


def test_ensure_image_when_no_kernel_can_be_had_then_says_so(tools: Path, tmp_path: Path) -> None:
    (tools / f"linux-image-{RELEASE}.deb").unlink()
    with pytest.raises(
        LabError, match="the lab's image can't be made: apt-get could not download linux-image-"
    ):
        make(tmp_path)


def test_require_space_when_disk_is_too_small_then_says_what_helps(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=f"needs {1 << 40} MiB in {tmp_path}/new, .* CASEMATE_LAB_CACHE"):
        require_space(tmp_path / "new", 1 << 40)


def test_run_group_when_it_takes_too_long_then_all_of_it_is_ended(tmp_path: Path) -> None:
    script = f"sleep 1000 & echo $! >{tmp_path}/child; wait"
    with pytest.raises(LabError, match="sh did not end within 1 s"):
        run_group(["sh", "-c", script], limit_s=1, scratch=tmp_path)
    await_end(int((tmp_path / "child").read_text()))


def test_run_group_when_interrupted_then_all_of_it_is_ended(tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), 2)

    script = f"sleep 1000 & echo $! >{tmp_path}/child; wait"
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_group(["sh", "-c", script], limit_s=60, scratch=tmp_path)
    await_end(int((tmp_path / "child").read_text()))


def await_end(pid: int) -> None:
    """Fail when the process is not gone, or dead and unclaimed, within ten seconds."""
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_explain_when_tool_said_nothing_then_its_status_is_told() -> None:
    assert explain("mmdebstrap", 25, "") == "mmdebstrap failed: exit status 25"
