"""A keeper for a sandbox that is none: its VMM is any small program."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from casemate.config.settings import Settings
from casemate.keeper.birth import NewKeeper
from casemate.keeper.client import KeeperClient, encode_bytes
from casemate.keeper.vmm import KeptVmm
from casemate.persist.store import SandboxDirectory
from casemate.types import SandboxId
from tests.support.fake_agent import FakeAgent

NAME = SandboxId("kept")
WAIT_S = 20.0


class Kept:
    """A directory, its keeper, and what a test asks of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = SandboxDirectory.take(settings, NAME)
        self.path = self.directory.path
        self.keeper = NewKeeper.start(self.path, NAME, log_bytes=1 << 16)
        self.vmm: KeptVmm | None = None

    def spawn(self, *words: str) -> KeptVmm:
        """Start a program in place of a VMM; its standard output is the console."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fds = [(theirs.fileno(), 1)]
            self.vmm = self.keeper.spawn(
                words, fds=fds, console_fd=ours.fileno(), vsock=None, timeout_s=WAIT_S
            )
        return self.vmm

    def commit(self) -> None:
        """Give the sandbox to the keeper and let go of it."""
        self.keeper.commit(self.directory.lock_fd, timeout_s=WAIT_S)
        self.directory.release()
        self.keeper.leave()

    def ask(self, op: str, timeout_s: float = WAIT_S, **fields: object) -> dict[str, object]:
        """One request on a connection of its own."""
        with KeeperClient.connect(self.path, NAME) as client:
            return client.request(op, timeout_s=timeout_s, **fields)  # type: ignore[arg-type]

    def keep(self, agent: FakeAgent, container: str = "web") -> None:
        """Let a container be kept."""
        self.ask("keep", container=container, agent={"hybrid": encode_bytes(agent.path)})

    def wait_gone(self, *pids: int) -> None:
        """Wait until these processes have ended."""
        for pid in pids:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                assert select.select([fd], [], [], WAIT_S)[0], f"process {pid} goes on"
            finally:
                os.close(fd)

    def close(self) -> None:
        """End all of it."""
        self.keeper.leave()
        if self.vmm is not None:
            self.wait_gone(self.vmm.pid)
            self.vmm.close()
        self.wait_gone(self.keeper.record.pid)
        self.directory.release()


@pytest.fixture
def kept(settings: Settings) -> Iterator[Kept]:
    kept = Kept(settings)
    yield kept
    if (kept.path / "keeper.sock").exists():
        kept.ask("end")
    kept.close()
    left = SandboxDirectory.take_left(settings, NAME)
    assert left is not None
    left.remove()


@pytest.fixture
def agent(kept: Kept) -> Iterator[FakeAgent]:
    agent = FakeAgent(Path(kept.path / "agent.sock"))
    yield agent
    agent.close()


def sleeper() -> Sequence[str]:
    """A program that runs until it is ended."""
    return ("sleep", "1000")
