"""Failpoints swept: each operation's steps are found by running it, and each step is made to fail in each way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from casemate import Settings
from casemate.observe import failpoints
from tests.support import leaks

__all__ = ["Step", "kill_vmm", "leaving_nothing", "steps_of", "vmm_pids"]

MOST_HITS = 4


@dataclass(frozen=True)
class Step:
    """One hit of a point in an operation: the point's name, and how often it was passed before."""

    name: str
    passed: int

    def __str__(self) -> str:
        return f"{self.name}[{self.passed}]"

    def armed(self, action: str) -> AbstractContextManager[Callable[[str], int]]:
        """The step does ``action``."""
        return failpoints.armed(self.setting(action))

    def setting(self, action: str) -> str:
        """The same as a setting."""
        return f"{self.name}={self.passed}*off->1*{action}"

    def calling(self, function: Callable[[], None]) -> AbstractContextManager[Callable[[str], int]]:
        """The step calls ``function``."""
        return failpoints.calling(self.name, function, after=self.passed)


def steps_of(operation: Callable[[], object]) -> tuple[Step, ...]:
    """The steps that ``operation`` passes, of those of one name at most four."""
    with failpoints.armed(";".join(f"{name}=off" for name in failpoints.POINTS)) as hits:
        operation()
        counts = {name: min(hits(name), MOST_HITS) for name in failpoints.POINTS}
    return tuple(Step(name, passed) for name, count in counts.items() for passed in range(count))


def vmm_pids(name: str) -> list[int]:
    """VMMs of the sandbox ``name``, recorded or not."""
    words = f"sandbox-{name}".encode()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words in line:
            found.append(int(pid))
    return found


def kill_vmm(name: str) -> bool:
    """Kill the VMM of the sandbox ``name``; False when there is none."""
    pids = vmm_pids(name)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)


@contextmanager
def leaving_nothing(settings: Settings, what: object = "") -> Iterator[None]:
    """What is there afterwards was there before; ``what`` is told when not."""

    def take() -> leaks.Snapshot:
        return leaks.take_snapshot(whole_host=True, state_root=settings.state_root)

    before = take()
    yield
    left = leaks.find_leaks(before, take)
    assert left == [], f"{what} left: {left}"
