"""SIGTERM and Ctrl-C at every kind of moment of ``casemate run``: it ends with the signal's status and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from casemate import Settings
from casemate.persist.store import list_records
from tests.e2e.test_recovery import vmms_of

pytestmark = [pytest.mark.root, pytest.mark.qemu]

# As in the tests of recovery, the interpreter's own trace tells of the moment; here the signal can be handled.
PROGRAM = """
import os, sys
from casemate.cli import main

number, event, function, called, *words = sys.argv[1:]
sent = []

def watch(frame, kind, argument):
    if not sent and kind == event and frame.f_code.co_qualname == function and (
        not called or getattr(argument, "__name__", "") == called
    ):
        sent.append(kind)
        os.kill(os.getpid(), int(number))

sys.setprofile(watch)
status = main(words)
sys.setprofile(None)
sys.exit(status if sent else 99)
"""

UNPACKING = {
    "image about to be unpacked": ("call", "Store._make", ""),
    "layer unpacked": ("c_return", "_unpack", "unpack_layer"),
    "file system about to be made": ("call", "make_filesystem", ""),
}
STARTING = {
    "planned": ("return", "Sandbox._plan", ""),
    "directory taken": ("return", "SandboxDirectory.take", ""),
    "document written": ("return", "Sandbox._save", ""),
    "sockets made": ("call", "Qemu.start", ""),
    "before the spawn": ("c_call", "Qemu.start", "spawn"),
    "after the spawn": ("c_return", "Qemu.start", "spawn"),
    "VMM recorded": ("call", "connect_agent", ""),
    "waits for the agent": ("call", "wait_readable", ""),
    "agent connected": ("call", "Sandbox._prepare_guest", ""),
}
STOPPING = {
    "stop begun": ("call", "Sandbox._stop", ""),
    "guest about to end": ("call", "Sandbox._destroy_guest", ""),
    "VMM about to quit": ("call", "Qemu._end_process", ""),
    "VMM gone": ("call", "SandboxDirectory.remove", ""),
}
BOTH = [
    *((moment, signal.SIGTERM) for moment in (*STARTING, *STOPPING)),
    ("after the spawn", signal.SIGINT),
    ("stop begun", signal.SIGINT),
]


def run_signalled(moment: tuple[str, str, str], number: int, *words: str) -> subprocess.CompletedProcess[str]:
    """``casemate run`` that gets signal ``number`` at ``moment``; status 99 when that never came."""
    command = [sys.executable, "-c", PROGRAM, str(int(number)), *moment, "run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("moment", "number"), BOTH, ids=lambda value: getattr(value, "name", value))
def test_run_when_signalled_at_a_moment_then_its_status_tells_and_nothing_is_left(
    moment: str, number: signal.Signals, busybox: str, settings: Settings
) -> None:
    name = f"signalled-{os.urandom(6).hex()}"

    done = run_signalled((STARTING | STOPPING)[moment], number, "--name", name, busybox, "true")

    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == ""
    assert list(list_records(settings)) == []
    sandboxes = settings.state_root / "sandboxes"
    assert not sandboxes.exists() or list(sandboxes.iterdir()) == []
    assert vmms_of(name) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", UNPACKING)
def test_run_when_signalled_while_an_image_is_unpacked_then_nothing_half_is_left(
    moment: str, number: signal.Signals, fresh_layout: Path, settings: Settings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cache = tmp_path / "cache"
    monkeypatch.setenv("CASEMATE_CACHE", str(cache))

    done = run_signalled(UNPACKING[moment], number, f"oci:{fresh_layout}")

    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == ""
    assert not settings.state_root.joinpath("sandboxes").exists()
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 0] == []
    assert not (set(cache.rglob("*.erofs")) | set(cache.rglob("random")))
