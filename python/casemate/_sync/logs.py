# Made by scripts/unasync.py from python/casemate/_async/logs.py; do not edit.
"""The output of a detached sandbox's containers, from its log, as it grows if that is wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import TracebackType

from casemate._compat import blocking as compat
from casemate.config.settings import Settings
from casemate.errors import InvalidStateError, NotFoundError
from casemate.keeper.client import KeeperClient
from casemate.persist.logs import LogEntry, LogFiles, last_lines, log_path
from casemate.persist.record import SandboxRecord
from casemate.persist.store import is_owned, sandboxes_root

__all__ = ["LogReader", "open_logs", "log_owner"]

_ANSWER_S = 10.0


class LogReader:
    """Entries of one log, in order. Made by ``Sandbox.logs``; iterate over it, and close it when you stop early.

    Args:
        files: The log; owned.
        keeper: To be asked for more; owned. None: what is there is all.
        since_ns: Entries before this time are left out.
        tail: Only the last lines of what is there at the begin; None: all.
    """

    __slots__ = ("_container_id", "_entries", "_files", "_keeper", "_since_ns", "_tail")

    def __init__(
        self,
        files: LogFiles,
        container_id: str,
        *,
        keeper: KeeperClient | None,
        since_ns: int = 0,
        tail: int | None = None,
    ) -> None:
        self._files = files
        self._container_id = container_id
        self._keeper = keeper
        self._since_ns = since_ns
        self._tail = tail
        self._entries: deque[LogEntry] = deque()

    def __iter__(self) -> Iterator[LogEntry]:
        """Entries until the last one; with ``follow`` until the container has ended."""
        with self:
            if self._tail is not None:
                self._entries.extend(compat.to_thread(self._read_tail, self._tail))
            while True:
                while self._entries:
                    entry = self._entries.popleft()
                    if entry.time_unix_ns >= self._since_ns:
                        yield entry
                self._entries.extend(compat.to_thread(self._files.read))
                if not self._entries and not self._wait_for_more():
                    return

    def close(self) -> None:
        """Close it. Idempotent."""
        self._files.close()
        if self._keeper is not None:
            self._keeper.close()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_tail(self, count: int) -> list[LogEntry]:
        return list(last_lines(self._everything(), count))

    def _everything(self) -> list[LogEntry]:
        found: list[LogEntry] = []
        while entries := self._files.read():
            found += (entry for entry in entries if entry.time_unix_ns >= self._since_ns)
        return found

    def _wait_for_more(self) -> bool:
        """Whether something has come; False when nothing more will. The keeper wakes it: nobody looks again and again."""
        if self._keeper is None:
            return False
        inode, offset = self._files.position
        try:
            self._keeper.send("follow", container=self._container_id, file=inode, offset=offset)
            compat.wait_readable([self._keeper.fileno()], None)
            answer = self._keeper.receive(timeout_s=_ANSWER_S)
        except (InvalidStateError, NotFoundError):
            # The keeper has ended, or the container was removed: what is on disk is all there will be.
            self._keeper.close()
            self._keeper = None
            return True
        return not answer["ended"]


def log_owner(record: SandboxRecord, container: str | None) -> str:
    """The container whose log is meant; None: the only one.

    Raises:
        NotFoundError: There is no such container, or not just one.
        InvalidStateError: The sandbox has no keeper, so nobody took anything down.
    """
    names = [one.id for one in record.containers]
    if container is None and len(names) != 1:
        raise NotFoundError(
            f"sandbox {record.id!r} has not one container but: {', '.join(names) or 'none'}; name one",
            sandbox_id=record.id,
        )
    chosen = container if container is not None else names[0]
    if chosen not in names:
        raise NotFoundError(
            f"sandbox {record.id!r} has no container {chosen!r}; it has: {', '.join(names) or 'none'}",
            sandbox_id=record.id,
            container_id=chosen,
        )
    if record.keeper is None:
        raise InvalidStateError(
            f"sandbox {record.id!r} is not detached: the process that made it reads the output itself",
            state="owned",
            wanted="detached",
            op="sandbox.logs",
            sandbox_id=record.id,
        )
    return chosen


def open_logs(
    settings: Settings,
    record: SandboxRecord,
    container: str | None,
    *,
    follow: bool = False,
    since_s: float | None = None,
    tail: int | None = None,
) -> LogReader:
    """The log of a container of a living or a dead detached sandbox; arguments as of ``Sandbox.logs``. Does not block."""
    chosen = log_owner(record, container)
    directory = sandboxes_root(settings) / record.id
    keeper = None
    if follow and is_owned(settings, record.id):
        keeper = KeeperClient.connect(directory, record.id)
    return LogReader(
        LogFiles(log_path(directory, chosen)),
        chosen,
        keeper=keeper,
        since_ns=0 if since_s is None else int(since_s * 1e9),
        tail=tail,
    )
