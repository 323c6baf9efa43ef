"""What a test may leave behind by mistake: taken before, compared after."""

from __future__ import annotations

import gc
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["find_leaks", "start_permanent_threads", "take_snapshot"]

Snapshot = dict[str, frozenset[str]]

# Native threads that live as long as the process, by the names they carry.
PERMANENT_THREADS = ("casemate-watch",)
SETTLE_S = 2.0


def start_permanent_threads() -> None:
    """Start what is started on first use and then stays, with its descriptors, so that no comparison sees it come."""
    from casemate import _core

    _core.spawn(["/bin/true"]).wait(10)


def take_snapshot(*, whole_host: bool, state_root: Path | None = None) -> Snapshot:
    """Descriptors, threads and children of this process; with ``whole_host`` also what lies in the kernel and on disk."""
    snapshot = {"descriptor": _descriptors(), "thread": _threads(), "child": _children()}
    if whole_host:
        snapshot |= {
            "network interface": _names("/sys/class/net"),
            "network namespace": _names("/run/netns"),
            "mount": frozenset(_mounts()),
            "cgroup": frozenset(_cgroups()),
            "state file": frozenset(_state_files(state_root)) if state_root else frozenset(),
            "process of a sandbox": frozenset(_processes(str(state_root))) if state_root else frozenset(),
        }
    return snapshot


def find_leaks(before: Snapshot, take: Callable[[], Snapshot]) -> list[str]:
    """What is there now and was not before; given two seconds to go, since the kernel tears down in its own time."""
    leaks = _difference(before, take())
    if not leaks:
        return []
    # What only a cycle keeps alive is no leak; collecting after each test would cost more than most tests.
    gc.collect()
    deadline = time.monotonic() + SETTLE_S
    while leaks := _difference(before, take()):
        if time.monotonic() > deadline:
            break
        # No event tells of all these at once; this is the one place that looks again and again.
        time.sleep(0.02)
    return leaks


def _difference(before: Snapshot, after: Snapshot) -> list[str]:
    return [f"{kind}: {name}" for kind, names in after.items() for name in sorted(names - before[kind])]


def _descriptors() -> frozenset[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return frozenset(found)


def _threads() -> frozenset[str]:
    python = {f"{thread.name} (Python)" for thread in threading.enumerate()}
    native = set()
    for task in os.listdir("/proc/self/task"):
        name = _read(f"/proc/self/task/{task}/comm").strip()
        if name and not name.startswith(PERMANENT_THREADS):
            native.add(f"{task} {name}")
    return frozenset(python | native)


def _children() -> frozenset[str]:
    listings = [Path(f"/proc/self/task/{task}/children") for task in os.listdir("/proc/self/task")]
    if all(listing.exists() for listing in listings):
        pids = {pid for listing in listings for pid in _read(str(listing)).split()}
    else:
        pids = {pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()}
    return frozenset(f"{pid} {_read(f'/proc/{pid}/comm').strip()}" for pid in pids)


def _parent(pid: str) -> int | None:
    # Behind the command, which stands in brackets and may hold anything: state, parent, …
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def _processes(needle: str) -> Iterator[str]:
    own = str(os.getpid())
    for pid in filter(str.isdigit, os.listdir("/proc")):
        command = _read(f"/proc/{pid}/cmdline").replace("\0", " ")
        if pid != own and needle in command:
            yield f"{pid} {command[:120]}"


def _mounts() -> Iterator[str]:
    for line in _read("/proc/self/mountinfo").splitlines():
        yield line.split()[4]


def _cgroups() -> Iterator[str]:
    root = Path("/sys/fs/cgroup")
    for controller in (root, *(path for path in root.glob("*") if path.is_dir())):
        for pattern in ("casemate*", "*/casemate*", "casemate*/*"):
            yield from (str(path) for path in controller.glob(pattern) if path.is_dir())


def _state_files(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        is_lock = path.suffix == ".lock" and path.parent == root
        if not is_lock and not (stat.S_ISDIR(path.lstat().st_mode) and path.parent == root):
            yield str(path)


def _names(directory: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))
    except FileNotFoundError:
        return frozenset()


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
