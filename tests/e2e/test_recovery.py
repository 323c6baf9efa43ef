"""Owners killed at every kind of moment: what they left is removed from disk alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from casemate import ContainerConfig, InvalidStateError, Sandbox, SandboxConfig, Settings
from casemate.persist.store import SandboxDirectory, sandboxes_root
from casemate.types import SandboxId

pytestmark = [pytest.mark.root, pytest.mark.qemu]

# The interpreter's own trace tells of the moment: nothing of casemate is changed and nobody has to guess a time.
OWNER = """
import os, signal, sys
from casemate import ContainerConfig, Sandbox, SandboxConfig

image, name, event, function, called = sys.argv[1:]

def watch(frame, kind, argument):
    if kind == event and frame.f_code.co_qualname == function and (
        not called or getattr(argument, "__name__", "") == called
    ):
        os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(watch)
container = ContainerConfig(image=image, command=("cat",))
with Sandbox.create(SandboxConfig(name=name), containers=(container,), start=True) as sandbox:
    sandbox.container().exec(["true"], capture=True)
    process = sandbox.container().exec(["echo", "said"])
    process.stdout.read()
    process.wait()
"""

NO_DOCUMENT, NO_VMM, WITH_VMM = "no document", "document without a VMM", "document with a VMM"
MOMENTS = {
    "directory made": ("call", "SandboxDirectory.write", "", NO_DOCUMENT),
    "document half replaced": ("c_call", "write_record", "rename", NO_DOCUMENT),
    "document written": ("return", "Sandbox._save", "", NO_VMM),
    "sockets made": ("call", "Qemu.start", "", NO_VMM),
    "before the spawn": ("c_call", "Qemu.start", "spawn", NO_VMM),
    "after the spawn": ("c_return", "Qemu.start", "spawn", NO_VMM),
    "VMM recorded": ("call", "connect_agent", "", WITH_VMM),
    "agent connected": ("call", "Sandbox._prepare_guest", "", WITH_VMM),
    "container asked for": ("return", "Sandbox._begin_container", "", WITH_VMM),
    "running": ("return", "Sandbox.create", "", WITH_VMM),
    "during an exec": ("call", "Container.exec", "", WITH_VMM),
    "exec answered": ("return", "Container.exec", "", WITH_VMM),
    "output read": ("return", "Reader.read", "", WITH_VMM),
    "process waited for": ("call", "Process.wait", "", WITH_VMM),
    "stop begun": ("call", "Sandbox._destroy_guest", "", WITH_VMM),
    "VMM about to quit": ("call", "Qemu._end_process", "", WITH_VMM),
    "VMM gone": ("call", "SandboxDirectory.remove", "", WITH_VMM),
    "document removed": ("return", "SandboxDirectory._clear", "", NO_DOCUMENT),
}


def run_owner(image: str, name: str, moment: str) -> None:
    event, function, called, _ = MOMENTS[moment]
    words = [sys.executable, "-c", OWNER, image, name, event, function, called]
    done = subprocess.run(words, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def vmms_of(name: str) -> list[str]:
    """Processes that have the sandbox's name among their words."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.encode() in words:
            found.append(f"{pid} {words[:100]!r}")
    return found


def what_is_written(settings: Settings, name: str) -> str:
    (info,) = [one for one in Sandbox.list(settings=settings) if one.id == name]
    assert not info.alive
    if info.record is None:
        return NO_DOCUMENT
    return NO_VMM if info.record.vmm is None else WITH_VMM


@pytest.fixture
def name() -> str:
    return f"killed-{os.urandom(6).hex()}"


# Ten moments of a start, five of a run, four of an end.
@pytest.mark.parametrize("moment", MOMENTS)
def test_cleanup_when_owner_is_killed_then_the_host_is_as_before_and_a_living_neighbour_untouched(
    busybox: str, settings: Settings, name: str, moment: str
) -> None:
    with Sandbox.create(SandboxConfig(name="neighbour", hypervisor="mock"), settings=settings) as neighbour:
        before = neighbours_files(settings)
        run_owner(busybox, name, moment)
        assert what_is_written(settings, name) == MOMENTS[moment][3]
        check_cleanup(settings, name)
        assert neighbours_files(settings) == before
        assert Path(f"/proc/{neighbour.vmm_pid}").exists()
        assert neighbour.inspect().state.value == "running"
    assert list(sandboxes_root(settings).iterdir()) == []


def check_cleanup(settings: Settings, name: str) -> None:
    """The command removes all that is left of the sandbox and nothing else."""
    words = [sys.executable, "-m", "casemate", "cleanup", "--all"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n", "")
    assert vmms_of(name) == []
    assert [path.name for path in sandboxes_root(settings).iterdir()] == ["neighbour"]
    assert f"{settings.state_root}/sandboxes/{name}" not in Path("/proc/net/unix").read_text()
    SandboxDirectory.take(settings, SandboxId(name)).remove()
    assert not Sandbox.cleanup(name, settings=settings).removed


def neighbours_files(settings: Settings) -> dict[str, int]:
    """What the neighbour has on disk, and when it was changed."""
    return {
        path.name: path.lstat().st_mtime_ns for path in (sandboxes_root(settings) / "neighbour").iterdir()
    }


def test_create_when_a_killed_owner_left_the_name_then_it_is_taken_and_cleanup_leaves_the_new_one_alone(
    busybox: str, settings: Settings, name: str
) -> None:
    run_owner(busybox, name, "after the spawn")
    container = ContainerConfig(image=busybox, command=("cat",))
    with Sandbox.create(
        SandboxConfig(name=name), containers=(container,), start=True, settings=settings
    ) as sandbox:
        with pytest.raises(InvalidStateError):
            Sandbox.cleanup(name, settings=settings)
        subprocess.run([sys.executable, "-m", "casemate", "cleanup", "--all"], check=True, timeout=60)
        (info,) = Sandbox.list(settings=settings)
        assert (info.id, info.alive, info.owner_pid) == (name, True, os.getpid())
        assert sandbox.container().exec(["echo", "here"], capture=True).stdout == "here\n"


def test_cleanup_when_owner_and_vmm_are_killed_then_the_command_removes_all(
    busybox: str, settings: Settings, name: str
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "casemate", "run", "-i", "--name", name, busybox, "sh", "-c", "echo up; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == b"up\n"
        (info,) = Sandbox.list(settings=settings)
        assert info.record is not None
        assert info.record.vmm is not None
        os.kill(owner.pid, signal.SIGKILL)
        os.kill(info.record.vmm.pid, signal.SIGKILL)
    finally:
        owner.kill()
        owner.communicate()
    words = [sys.executable, "-m", "casemate", "cleanup", "--all"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n", "")
    assert vmms_of(name) == []
    assert list(sandboxes_root(settings).iterdir()) == []
