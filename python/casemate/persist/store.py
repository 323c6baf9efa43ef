"""State directories: taken with a lock, written whole, removed without a trace."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from casemate.persist.holders import find_socket_holders
from casemate.persist.migration import STEPS, Step, migrate
from casemate.persist.record import VERSION, ProcessRecord, SandboxRecord
from casemate.persist.trust import check_place, read_own
from casemate.types import SandboxId, check_identifier

__all__ = [
    "SOCKET_PATH_BYTES",
    "SandboxDirectory",
    "decode_record",
    "end_left_processes",
    "is_alive",
    "is_owned",
    "kill_recorded",
    "list_records",
    "load_record",
    "process_record",
    "read_start_time_ticks",
    "remove_empty",
    "sandboxes_root",
    "write_record",
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
        """Make the directory and lock it. Blocks: for file system calls, and the end of a VMM that a dead owner left.

        What a dead owner left under that name is removed first.

        Raises:
            AlreadyExistsError: A living owner holds that name.
            InvalidConfigError: The path is too long for sockets in it, a link, or another user's; nothing was made.
            HostError: The directory can't be made, or not be cleared.
            DeadlineExceededError: A VMM that was left does not end.
        """
        path = sandboxes_root(settings) / sandbox_id
        if len(os.fsencode(path / _LONGEST_SOCKET_NAME)) > SOCKET_PATH_BYTES:
            room = SOCKET_PATH_BYTES - len(_LONGEST_SOCKET_NAME) - len(sandbox_id) - len("/sandboxes//")
            raise InvalidConfigError(
                f"the state directory {path} is too long for a unix socket in it; "
                f"choose a state root of at most {room} bytes or a shorter name",
                path="state_root",
            )
        for place in (settings.state_root, sandboxes_root(settings), path):
            check_place(place)
        try:
            failpoints.hit("store.lock")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            while (lock_fd := _lock(path)) is None:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = cls(path, lock_fd)
            try:
                failpoints.hit("store.clear")
                if len(os.listdir(path)) > 1:
                    end_left_processes(path, *_left_processes(settings, sandbox_id))
                    directory._clear()
            except BaseException:
                directory._give_back()
                raise
        except BlockingIOError as error:
            raise AlreadyExistsError(
                f"a sandbox named {sandbox_id!r} exists already; choose another name or remove it first",
                sandbox_id=sandbox_id,
            ) from error
        except (HostError, DeadlineExceededError):
            raise
        except OSError as error:
            raise _host_error(f"the state directory {path} can't be made", path, error) from error
        return directory

    @classmethod
    def take_left(cls, settings: Settings, sandbox_id: SandboxId) -> SandboxDirectory | None:
        """Lock what a dead owner left, as it is; None when there is nothing. Does not block.

        Raises:
            BlockingIOError: The owner lives.
            OSError: The lock can't be opened.
        """
        path = sandboxes_root(settings) / sandbox_id
        lock_fd = _lock(path)
        return None if lock_fd is None else cls(path, lock_fd)

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the lock, borrowed; a copy of it holds the lock as well."""
        return self._lock_fd

    def write(self, record: SandboxRecord) -> None:
        """Write the state document. Raises and blocks as :func:`write_record`."""
        write_record(self.path, record)

    def remove(self) -> None:
        """Remove the directory and free the name. Idempotent, also when somebody else removed it.

        The name is free also after a failure: what is left is a dead directory, which the next one of the name clears.
        """
        if self._lock_fd < 0:
            return
        try:
            failpoints.hit("store.remove")
            self._clear()
            # The lock goes last: as long as anything is left, it tells whose that is.
            (self.path / "lock").unlink()
            self.path.rmdir()
        except OSError as error:
            # Not empty: the next owner came between the two.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            self.release()

    def release(self) -> None:
        """Let go of the lock; what is there stays. Idempotent."""
        if self._lock_fd >= 0:
            fd, self._lock_fd = self._lock_fd, -1
            os.close(fd)

    def _give_back(self) -> None:
        """Undo the taking: what a dead owner left stays, a directory that was made for us goes."""
        try:
            if os.listdir(self.path) == ["lock"]:
                self.remove()
        finally:
            self.release()

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != "lock":
                _remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_record(directory: Path, record: SandboxRecord) -> None:
    """Write the state document so that a crash leaves the old one or the new one. Blocks: for a sync.

    It is for whoever holds the sandbox; others write while they have the keeper's turn for it.

    Raises:
        HostError: It can't be written (a full disk); the old one stands.
    """
    document = msgspec.json.format(msgspec.json.encode(record), indent=1)
    try:
        failpoints.hit("store.write")
        temporary = directory / "state.json.new"
        _write_file(temporary, document)
        failpoints.hit("store.rename")
        os.rename(temporary, directory / "state.json")
    except OSError as error:
        if isinstance(error, HostError):
            raise
        path = directory / "state.json"
        raise _host_error(f"the state document {path} can't be written", path, error) from error


def _write_file(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _host_error(text: str, path: Path, error: OSError) -> HostError:
    return HostError(
        f"{text}: {error.strerror or error}", errno=error.errno or 0, target=str(path), op="sandbox.create"
    )


def _remove_tree(path: Path) -> None:
    # Imported here: it brings five compression modules along, and a start does not need it.
    from shutil import rmtree

    rmtree(path)


def remove_empty(path: Path) -> bool:
    """Remove a directory with nothing in it; False when there is none such. Does not block.

    An owner that is about to lock it makes it anew, where a lock that it meets would refuse it the name.
    """
    try:
        path.rmdir()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a directory; None when there is no directory. Raises: BlockingIOError: it is held."""
    while True:
        if _owner_lives_without_lock(path):
            raise BlockingIOError(errno.EAGAIN, "its owner lives", str(path))
        try:
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # An owner that was just leaving removes the file: a lock on a removed file holds nothing.
            if os.fstat(fd).st_nlink:
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _owner_lives_without_lock(path: Path) -> bool:
    """Whether the lock's file is gone and the recorded owner is not: then nothing but its pid and start time tells of it."""
    if os.path.lexists(path / "lock"):
        return False
    try:
        record = decode_record(read_own(path / "state.json"), str(path))
    except (FileNotFoundError, NotADirectoryError, InvalidConfigError):
        return False
    return is_alive(record.owner)


def _left_processes(settings: Settings, sandbox_id: str) -> tuple[ProcessRecord | None, ...]:
    try:
        record = load_record(settings, sandbox_id)
    except (NotFoundError, InvalidConfigError):
        return ()  # their sockets tell of them
    return record.keeper, record.vmm


def load_record(settings: Settings, sandbox_id: str) -> SandboxRecord:
    """The state document of a sandbox. Blocks: for a file read.

    Raises:
        NotFoundError: There is none.
        InvalidConfigError: The document can't be read, or is of a newer version.
    """
    check_identifier(sandbox_id, "sandbox")
    path = sandboxes_root(settings) / sandbox_id / "state.json"
    try:
        document = read_own(path)
    except FileNotFoundError as error:
        known = sorted(entry.parent.name for entry in sandboxes_root(settings).glob("*/state.json"))
        names = f"; there are: {', '.join(known)}" if known else "; there is none"
        raise NotFoundError(f"no sandbox is named {sandbox_id!r}{names}", sandbox_id=sandbox_id) from error
    return decode_record(document, str(path))


def decode_record(
    document: bytes, name: str, *, version: int = VERSION, steps: Mapping[int, Step] = STEPS
) -> SandboxRecord:
    """The record of a state document, brought up to ``version`` where it is older. Does not block.

    Raises:
        InvalidConfigError: It can't be read, or is of a newer version; ``name`` says where it lies.
    """
    try:
        decoded: Any = msgspec.json.decode(document)
        return msgspec.convert(
            migrate(decoded, version=version, steps=steps, name=name),
            SandboxRecord,
            strict=True,
            str_keys=True,
        )
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"{name} is not a state document: {error}", path=name) from error


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
        return _owner_lives_without_lock(sandboxes_root(settings) / sandbox_id)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def end_left_processes(directory: Path, *recorded: ProcessRecord | None) -> tuple[int, ...]:
    """End the recorded processes and whatever else holds a socket of ``directory``; return their ids.

    The sockets find a VMM or a keeper that was started and not recorded any more.

    Raises: as :func:`kill_recorded`.
    Blocks: for their ends.
    """
    ended = [one.pid for one in recorded if one is not None and kill_recorded(one)]
    for pid in find_socket_holders(directory):
        ticks = read_start_time_ticks(pid)
        # It has to hold the socket after the start time was read, else the number may have changed hands.
        if ticks is None or pid not in find_socket_holders(directory):
            continue
        if kill_recorded(ProcessRecord(pid=pid, start_time_ticks=ticks)) and pid not in ended:
            ended.append(pid)
    return tuple(ended)


def kill_recorded(process: ProcessRecord) -> bool:
    """End a process of a record with SIGKILL if it is still the same one; False when it is gone.

    Raises:
        HostError: It belongs to another user.
        DeadlineExceededError: It did not end in 5 s: the kernel holds it.
    Blocks: for its end.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return False
        raise
    try:
        # The pidfd is held before the start time is compared, so the number can't change hands in between.
        if read_start_time_ticks(process.pid) != process.start_time_ticks:
            return False
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        if not select.select([fd], [], [], KILL_S)[0]:
            raise DeadlineExceededError(
                f"process {process.pid} did not end within {KILL_S:g} s of SIGKILL",
                deadline_s=KILL_S,
                waited_s=KILL_S,
                op="sandbox.cleanup",
            )
        return True
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise HostError(
            f"process {process.pid} belongs to another user and can't be ended",
            errno=error.errno or 0,
            target=str(process.pid),
            op="sandbox.cleanup",
        ) from error
    finally:
        os.close(fd)


def is_alive(process: ProcessRecord) -> bool:
    """Whether a recorded process is there and still the same one, whoever's it is. A zombie is not. Does not block."""
    stat = _read_stat(process.pid)
    return stat is not None and stat[0] not in ("Z", "X") and int(stat[19]) == process.start_time_ticks


def read_start_time_ticks(pid: int) -> int | None:
    """Field 22 of ``/proc/<pid>/stat``: clock ticks since the host's boot; None when the process is gone."""
    stat = _read_stat(pid)
    return None if stat is None else int(stat[19])


def _read_stat(pid: int) -> list[str] | None:
    # Behind the command, which stands in brackets and may hold anything: state, parent, …
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()


def process_record(pid: int) -> ProcessRecord:
    """The record of a living process."""
    ticks = read_start_time_ticks(pid)
    if ticks is None:
        raise NotFoundError(f"there is no process {pid}")
    return ProcessRecord(pid=pid, start_time_ticks=ticks)
