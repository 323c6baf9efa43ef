"""The cache of guest assets, ``<cache>/guest``: what is in it is whole, or is not in it.

::

    kernels/<id>/          entry.json vmlinux vmlinuz config modules/     one unpacked kernel
    initrds/<key>.img      and <key>.json, what is in it
    current/<name>         symbolic link: the kernel that a series or "auto" stands for
    facts/<key>.json       what was found out about a file, by its identity and times
    locks/<name>           held while the thing of that name is made
    tmp/                   things being made; each is locked by its maker, so what a dead one left is swept

A thing is made in ``tmp`` and renamed into place, so an interrupted maker leaves nothing half. Reading needs no lock and no
right to write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from casemate.errors import DeadlineExceededError, HostError, ResourceExhaustedError

__all__ = ["InitrdRecord", "KernelEntry", "Store"]

_MAX_FACTS = 256
_LOCK_POLL_S = 0.05

T = TypeVar("T")


class KernelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel of the cache.

    Args:
        id: Its directory's name: package and version, or a digest.
        release: Kernel release, as in ``uname -r``.
        source: Where it came from, for people: package and version, or a path.
        kernel: File in the directory that the VMM boots.
        kernel_bytes: Its length.
        made_at_s: Seconds since the epoch when it was put here.
    """

    id: str
    release: str
    source: str
    kernel: str
    kernel_bytes: int
    made_at_s: int = 0


class InitrdRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One initrd of the cache: its length, the modules in it, what it was made for."""

    key: str
    initrd_bytes: int
    modules: tuple[str, ...]
    kernel_id: str
    machine: str


class Store:
    """One cache directory. Making the object touches nothing."""

    __slots__ = ("root",)

    def __init__(self, root: Path) -> None:
        self.root = root

    # -- reading: no lock, nothing is written

    def kernel_directory(self, kernel_id: str) -> Path:
        """Where the kernel ``kernel_id`` is or would be."""
        return self.root / "kernels" / kernel_id

    def kernel_path(self, entry: KernelEntry) -> Path:
        """The file that the VMM boots."""
        return self.kernel_directory(entry.id) / entry.kernel

    def read_kernel(self, kernel_id: str) -> KernelEntry | None:
        """The entry, None when it is not there or its kernel file is not as long as it was."""
        entry = _read(self.kernel_directory(kernel_id) / "entry.json", KernelEntry)
        if entry is None or _size(self.kernel_path(entry)) != entry.kernel_bytes:
            return None
        return entry

    def read_current(self, name: str) -> KernelEntry | None:
        """The kernel that the series ``name``, or ``auto``, stands for."""
        kernel_id = _link(self.root / "current" / name)
        return self.read_kernel(kernel_id) if kernel_id else None

    def names_of(self, kernel_id: str) -> tuple[str, ...]:
        """The series, and ``auto``, that the kernel stands for."""
        directory = self.root / "current"
        return tuple(name for name in sorted(_names(directory)) if _link(directory / name) == kernel_id)

    def list_kernels(self) -> tuple[KernelEntry, ...]:
        """All kernels, by id."""
        names = sorted(_names(self.root / "kernels"))
        return tuple(entry for name in names if (entry := self.read_kernel(name)) is not None)

    def initrd_path(self, key: str) -> Path:
        """Where the initrd ``key`` is or would be."""
        return self.root / "initrds" / f"{key}.img"

    def read_initrd(self, key: str) -> InitrdRecord | None:
        """What is known of the initrd, None when it is not there whole."""
        record = _read(self.root / "initrds" / f"{key}.json", InitrdRecord)
        if record is None or _size(self.initrd_path(key)) != record.initrd_bytes:
            return None
        return record

    def list_initrds(self) -> tuple[InitrdRecord, ...]:
        """All initrds, by key."""
        keys = sorted(
            name.removesuffix(".json") for name in _names(self.root / "initrds") if name.endswith(".json")
        )
        return tuple(record for key in keys if (record := self.read_initrd(key)) is not None)

    def facts(self, path: Path, kind: type[T], find: Callable[[], T]) -> T:
        """What ``find`` returns about the file ``path``; found out once for each state of the file.

        A cache that can't be written only costs the time of finding it out again.
        """
        key = _facts_key(path, kind.__name__)
        if key is None:
            return find()
        known = _read(self.root / "facts" / f"{key}.json", kind)
        if known is not None:
            return known
        found = find()
        self._write_facts(key, msgspec.json.encode(found))
        return found

    # -- writing

    def _write_facts(self, key: str, document: bytes) -> None:
        with contextlib.suppress(HostError, ResourceExhaustedError):
            directory = self._directory("facts")
            names = sorted(_names(directory), key=lambda name: _modified_ns(directory / name))
            for name in names[: max(0, len(names) - _MAX_FACTS + 1)]:
                (directory / name).unlink(missing_ok=True)
            self._write_whole(directory / f"{key}.json", document)

    def write_current(self, name: str, kernel_id: str) -> None:
        """Let ``name`` stand for the kernel ``kernel_id``."""
        directory = self._directory("current")
        with self.staging("current") as staging, _host_errors(directory):
            link = staging / "link"
            link.symlink_to(Path("..") / "kernels" / kernel_id)
            link.rename(directory / name)

    def publish_kernel(self, staging: Path, entry: KernelEntry) -> KernelEntry:
        """Move the finished directory ``staging`` into place; an older one of that id is put aside and removed."""
        target = self._directory("kernels") / entry.id
        with _host_errors(target):
            self._write_whole(staging / "entry.json", msgspec.json.encode(entry))
            _sync(staging / entry.kernel)
            with self.staging("replaced") as aside:
                if target.exists():
                    target.rename(aside / "old")
                staging.rename(target)
            _sync(target.parent)
        return entry

    def publish_initrd(self, record: InitrdRecord, archive: bytes) -> InitrdRecord:
        """Write the archive, then the record that says it is there."""
        directory = self._directory("initrds")
        self._write_whole(self.initrd_path(record.key), archive)
        self._write_whole(directory / f"{record.key}.json", msgspec.json.encode(record))
        return record

    @contextlib.contextmanager
    def lock(self, name: str, *, deadline_s: float) -> Iterator[None]:
        """Hold the lock ``name`` among all processes of the host.

        Raises:
            DeadlineExceededError: Another process held it for ``deadline_s``.
            HostError: The cache can't be written.
        Blocks: until it is free.
        """
        path = self._directory("locks") / name
        with _host_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(descriptor, path, deadline_s)
            yield
        finally:
            os.close(descriptor)

    @staticmethod
    def _take(descriptor: int, path: Path, deadline_s: float) -> None:
        started = time.monotonic()
        # A file lock has no descriptor to wait on with a deadline, and the holder takes seconds: so it is tried again.
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited_s = time.monotonic() - started
                if waited_s >= deadline_s:
                    raise DeadlineExceededError(
                        f"another process has been making guest assets for {waited_s:.0f} s (lock {path})",
                        deadline_s=deadline_s,
                        waited_s=waited_s,
                    ) from None
                time.sleep(min(_LOCK_POLL_S, deadline_s - waited_s))

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A new directory on the cache's file system; what is still in it at the end is removed."""
        import shutil
        import tempfile

        parent = self._directory("tmp")
        _sweep(parent)
        with _host_errors(parent):
            path = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.chmod(path, 0o755)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def _directory(self, name: str) -> Path:
        path = self.root / name
        with _host_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def _write_whole(self, path: Path, content: bytes) -> None:
        with self.staging("file") as staging, _host_errors(path):
            temporary = staging / path.name
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(path)


def _sweep(parent: Path) -> None:
    """Remove what makers that are dead have left: their locks are free."""
    import shutil

    for name in _names(parent):
        try:
            descriptor = os.open(parent / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # its maker has just finished with it
        try:
            # A directory this young may not be locked yet.
            if time.time() - os.fstat(descriptor).st_mtime > 60:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(parent / name, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _host_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if isinstance(exc, HostError):
            raise
        text = f"the cache of guest assets can't be written at {target}: {os.strerror(exc.errno or 0)}"
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhaustedError(text) from exc
        raise HostError(
            f"{text}; set CASEMATE_CACHE to a directory that can be", errno=exc.errno or 0, target=str(target)
        ) from exc


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path) -> str:
    """Last part of what a symbolic link points to, empty without one."""
    try:
        return Path(os.readlink(path)).name
    except OSError:
        return ""


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _modified_ns(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _read(path: Path, kind: type[T]) -> T | None:
    """A document of the cache; None when it is missing or of another version's form."""
    try:
        with path.open("rb") as stream:
            return msgspec.json.decode(stream.read(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _facts_key(path: Path, kind: str) -> str | None:
    """Names a file in its present state: another content has another time, length or inode."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join([kind, *(f"{number:x}" for number in state)])
