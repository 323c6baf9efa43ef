"""State directories: taken with a lock, written whole, removed without a trace."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec

from casemate.config.settings import Settings
from casemate.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    HostError,
    InvalidConfigError,
    NotFoundError,
)
from casemate.observe import failpoints
from casemate.persist.record import VERSION, ProcessRecord, SandboxRecord
from casemate.types import SandboxId, check_identifier

__all__ = [
    "SOCKET_PATH_BYTES",
    "SandboxDirectory",
    "list_records",
    "load_record",
    "process_record",
    "purge_dead",
    "read_start_time_ticks",
]

SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket on Linux, the closing zero left out."""

KILL_S = 5.0
_LONGEST_SOCKET_NAME = "vsock.sock_4294967295"


def sandboxes_root(settings: Settings) -> Path:
    """The directory that holds a directory for each sandbox."""
    return settings.state_root / "sandboxes"


class SandboxDirectory:
    """The state directory of one sandbox, held by its owner.

    The lock on ``lock`` is held as long as the owner lives: a directory whose lock is free is a dead one.
    """

    __slots__ = ("_lock_fd", "path")

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def take(cls, settings: Settings, sandbox_id: SandboxId) -> SandboxDirectory:
        """Make the directory and lock it. Blocks: for file system calls.

        A directory left by a dead owner is cleared first.

        Raises:
            AlreadyExistsError: A living owner holds that name.
            InvalidConfigError: The path is too long for sockets in it.
            HostError: The directory can't be made.
        """
        path = sandboxes_root(settings) / sandbox_id
        if len(os.fsencode(path / _LONGEST_SOCKET_NAME)) > SOCKET_PATH_BYTES:
            room = SOCKET_PATH_BYTES - len(_LONGEST_SOCKET_NAME) - len(sandbox_id) - len("/sandboxes//")
            raise InvalidConfigError(
                f"the state directory {path} is too long for a unix socket in it; "
                f"choose a state root of at most {room} bytes or a shorter name",
                path="state_root",
            )
        try:
            failpoints.hit("store.lock")
            directory = cls(path, _lock(path, sandbox_id))
            try:
                directory._clear()
            except BaseException as error:
                try:
                    directory.remove()
                except OSError as second:
                    error.add_note(f"and {path} is left behind: {second}")
                raise
        except OSError as error:
            if isinstance(error, HostError):
                raise
            raise _host_error(f"the state directory {path} can't be made", path, error) from error
        return directory

    def write(self, record: SandboxRecord) -> None:
        """Write the state document so that a crash leaves the old one or the new one. Blocks: for a sync.

        Raises:
            HostError: It can't be written (a full disk); the old one stands.
        """
        document = msgspec.json.format(msgspec.json.encode(record), indent=1)
        try:
            failpoints.hit("store.write")
            self._replace_document(document)
        except OSError as error:
            if isinstance(error, HostError):
                raise
            path = self.path / "state.json"
            raise _host_error(f"the state document {path} can't be written", path, error) from error

    def _replace_document(self, document: bytes) -> None:
        temporary = self.path / "state.json.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(document)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        failpoints.hit("store.rename")
        os.rename(temporary, self.path / "state.json")

    def remove(self) -> None:
        """Remove the directory and free the name. Idempotent.

        The name is free also when files can't be removed: what is left is a dead directory, which the next one of the name clears.
        """
        if self._lock_fd < 0:
            return
        try:
            failpoints.hit("store.remove")
            _remove_tree(self.path)
        finally:
            self._release()

    def _release(self) -> None:
        fd, self._lock_fd = self._lock_fd, -1
        os.close(fd)

    def _clear(self) -> None:
        failpoints.hit("store.clear")
        for entry in self.path.iterdir():
            if entry.name != "lock":
                _remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _host_error(text: str, path: Path, error: OSError) -> HostError:
    return HostError(
        f"{text}: {error.strerror or error}", errno=error.errno or 0, target=str(path), op="sandbox.create"
    )


def _remove_tree(path: Path) -> None:
    # Imported here: it brings five compression modules along, and a start does not need it.
    from shutil import rmtree

    rmtree(path)


def _lock(path: Path, sandbox_id: str) -> int:
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # An owner that was just leaving removes the file: a lock on a removed file holds nothing.
            if os.fstat(fd).st_nlink:
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise AlreadyExistsError(
                f"a sandbox named {sandbox_id!r} exists already; choose another name or remove it first",
                sandbox_id=sandbox_id,
            ) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def load_record(settings: Settings, sandbox_id: str) -> SandboxRecord:
    """The state document of a sandbox. Blocks: for a file read.

    Raises:
        NotFoundError: There is none.
        InvalidConfigError: The document can't be read, or is of a newer version.
    """
    check_identifier(sandbox_id, "sandbox")
    path = sandboxes_root(settings) / sandbox_id / "state.json"
    try:
        document = path.read_bytes()
    except FileNotFoundError as error:
        known = sorted(record.id for record, _ in list_records(settings))
        names = f"; there are: {', '.join(known)}" if known else "; there is none"
        raise NotFoundError(f"no sandbox is named {sandbox_id!r}{names}", sandbox_id=sandbox_id) from error
    try:
        version = msgspec.json.decode(document, type=_Version).version
        if version != VERSION:
            raise InvalidConfigError(
                f"{path} is of version {version}, this casemate reads version {VERSION}", path="version"
            )
        return msgspec.json.decode(document, type=SandboxRecord)
    except msgspec.DecodeError as error:
        raise InvalidConfigError(f"{path} is not a state document: {error}", path=str(path)) from error


class _Version(msgspec.Struct):
    version: int


def list_records(settings: Settings) -> Iterator[tuple[SandboxRecord, bool]]:
    """Each sandbox's document, and whether its owner lives. Blocks: for file reads."""
    try:
        names = sorted(os.listdir(sandboxes_root(settings)))
    except FileNotFoundError:
        return
    for name in names:
        try:
            yield load_record(settings, name), is_owned(settings, name)
        except NotFoundError:
            continue


def is_owned(settings: Settings, sandbox_id: str) -> bool:
    """Whether a living process holds the sandbox. Does not block."""
    try:
        fd = os.open(sandboxes_root(settings) / sandbox_id / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def purge_dead(settings: Settings, sandbox_id: str) -> bool:
    """Remove what a dead owner left; False when there was nothing. Blocks: for the end of a VMM, if one is left.

    Raises:
        AlreadyExistsError: The owner lives.
    """
    record: SandboxRecord | None
    try:
        record = load_record(settings, sandbox_id)
    except NotFoundError:
        if not (sandboxes_root(settings) / sandbox_id).is_dir():
            return False
        record = None
    vmm = record.vmm if record is not None else None
    if vmm is not None and not is_owned(settings, sandbox_id):
        kill_recorded(vmm)
    SandboxDirectory.take(settings, SandboxId(sandbox_id)).remove()
    return True


def kill_recorded(process: ProcessRecord) -> None:
    """End a process of a record with SIGKILL if it is still the same one.

    Raises:
        DeadlineExceededError: It did not end in 5 s: the kernel holds it.
    Blocks: for its end.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return
        raise
    try:
        # The pidfd is held before the start time is compared, so the number can't change hands in between.
        if read_start_time_ticks(process.pid) == process.start_time_ticks:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            if not select.select([fd], [], [], KILL_S)[0]:
                raise DeadlineExceededError(
                    f"process {process.pid} did not end within {KILL_S:g} s of SIGKILL",
                    deadline_s=KILL_S,
                    waited_s=KILL_S,
                    op="sandbox.purge",
                )
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


def read_start_time_ticks(pid: int) -> int | None:
    """Field 22 of ``/proc/<pid>/stat``: clock ticks since the host's boot; None when the process is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def process_record(pid: int) -> ProcessRecord:
    """The record of a living process."""
    ticks = read_start_time_ticks(pid)
    if ticks is None:
        raise NotFoundError(f"there is no process {pid}")
    return ProcessRecord(pid=pid, start_time_ticks=ticks)
