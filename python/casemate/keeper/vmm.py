"""The VMM of a detached sandbox as other processes see it: a process that is no child of theirs."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

from casemate.errors import CasemateError, DeadlineExceededError, InvalidStateError
from casemate.hypervisor import VmmProcess
from casemate.keeper.client import KeeperClient
from casemate.persist.outcome import read_end
from casemate.persist.record import ProcessRecord
from casemate.persist.store import read_start_time_ticks

__all__ = ["UNKNOWN_STATUS", "KeptVmm"]

UNKNOWN_STATUS = 255
"""Of a VMM whose keeper was killed: nobody could take its status."""

_RECORD_S = 5.0
_TAILS_S = 5.0


class KeptVmm:
    """What ``_core.ChildProcess`` is for a child: its end, its status, its last words. Closed when it is dropped.

    Args:
        directory: Of the sandbox.
        process: The VMM.
        keeper: Its keeper.
    """

    __slots__ = ("_directory", "_keeper", "_pidfd", "pid", "start_time_ticks")

    def __init__(self, directory: Path, process: VmmProcess | ProcessRecord, keeper: ProcessRecord) -> None:
        self.pid = process.pid
        self.start_time_ticks = process.start_time_ticks
        self._directory = directory
        self._keeper = keeper
        self._pidfd = -1
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError as error:
            raise self._gone() from error
        self._pidfd = pidfd
        # Held before it is compared: the number can't change hands in between.
        if read_start_time_ticks(process.pid) != process.start_time_ticks:
            self.close()
            raise self._gone()

    def fileno(self) -> int:
        """The pidfd, borrowed: readable when it has ended."""
        return self._pidfd

    def exit_status(self) -> int | None:
        """Exit status, negative for a signal, None while it runs or its keeper has not told yet. Does not block."""
        if not self._has_ended(0.0):
            return None
        end = read_end(self._directory)
        if end is not None and end.vmm_pid == self.pid:
            return end.status
        return (
            None
            if read_start_time_ticks(self._keeper.pid) == self._keeper.start_time_ticks
            else UNKNOWN_STATUS
        )

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end and its keeper's word of it.

        Raises: DeadlineExceededError. Blocks: until then, and a moment longer than ``timeout_s`` when it has just ended.
        """
        if not self._has_ended(timeout_s):
            raise DeadlineExceededError(
                f"the process {self.pid} did not end within {timeout_s or 0:g} s",
                deadline_s=timeout_s or 0.0,
                waited_s=timeout_s or 0.0,
                op="vmm.wait",
            )
        self._await_keeper()
        status = self.exit_status()
        return UNKNOWN_STATUS if status is None else status

    def send_signal(self, number: int) -> bool:
        """Send a signal; False when it has ended already."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def stderr_tail(self) -> bytes:
        """The last of its stderr, 16 KiB at most. Blocks: for the keeper's answer."""
        return self._tail("stderr")

    def console_tail(self) -> bytes:
        """The last of the guest's console, 16 KiB at most. Blocks: for the keeper's answer."""
        return self._tail("console")

    def close(self) -> None:
        """Close the pidfd. Idempotent."""
        if self._pidfd >= 0:
            fd, self._pidfd = self._pidfd, -1
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_pidfd", -1) >= 0:
            self.close()

    def _has_ended(self, timeout_s: float | None) -> bool:
        if self._pidfd < 0:
            return True
        return bool(select.select([self._pidfd], [], [], timeout_s)[0])

    def _await_keeper(self) -> None:
        """It ends when it has written everything down."""
        try:
            fd = os.pidfd_open(self._keeper.pid)
        except ProcessLookupError:
            return
        try:
            deadline = time.monotonic() + _RECORD_S
            if read_start_time_ticks(self._keeper.pid) == self._keeper.start_time_ticks:
                select.select([fd], [], [], max(deadline - time.monotonic(), 0.0))
        finally:
            os.close(fd)

    def _tail(self, name: str) -> bytes:
        end = read_end(self._directory)
        if end is not None:
            return str(getattr(end, f"{name}_tail")).encode()
        try:
            with KeeperClient.connect(self._directory, self._directory.name) as client:
                return str(client.request("tails", timeout_s=_TAILS_S)[name]).encode()
        except CasemateError:
            # Of a keeper that is gone nothing can be asked: there is no tail.
            return b""

    def _gone(self) -> InvalidStateError:
        return InvalidStateError(
            f"the VMM (process {self.pid}) has ended", state="dead", wanted="running", op="sandbox.attach"
        )
