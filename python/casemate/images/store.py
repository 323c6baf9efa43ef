"""The unpacked images of this host: one directory an image, by digest, made whole or not at all.

::

    <cache_root>/images/sha256-<hex>/rootfs.erofs   read-only
                                     record.json
                       /names.json                  name → digest
                       /locks/<hex>, /locks/names   flock; never removed
                       /work/<hex>.<random>/        being made, or left by a process that died
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from casemate._core import remove_tree
from casemate.config.settings import Settings
from casemate.errors import DeadlineExceededError, HostError, ImageError, NotFoundError
from casemate.images.reference import normalise_name
from casemate.images.types import Filesystem, Image, ImageConfig

__all__ = ["ImageRecord", "Store"]

_log = logging.getLogger(__name__)

# linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x00020000

_RECORD_VERSION = 1
_RECORD_NAME = "record.json"
_LOCK_TIMEOUT_S = 900.0
_LOCK_RETRY_S = 0.05
_MIN_PREFIX = 12
_HEX = frozenset("0123456789abcdef")
_T = TypeVar("_T")


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``record.json``: everything about an image but its names, which change."""

    version: int = _RECORD_VERSION
    digest: str
    config: ImageConfig
    fstype: Filesystem
    size_bytes: int
    layers: tuple[str, ...]
    created: str = ""
    passwd: str = ""
    group: str = ""


class _Names(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    names: dict[str, str] = msgspec.field(default_factory=dict)


class Store:
    """One host's images. Holds nothing open; safe from several threads and processes."""

    __slots__ = ("_root", "_timeout_factor")

    def __init__(self, settings: Settings) -> None:
        self._root = settings.cache_root / "images"
        self._timeout_factor = settings.timeout_factor

    def load(self, digest: str) -> ImageRecord | None:
        """The record of an image that is whole; None when it has to be made. Blocks: for one small read."""
        directory = self._directory(digest)
        try:
            record = msgspec.json.decode((directory / _RECORD_NAME).read_bytes(), type=ImageRecord)
            size_bytes = (directory / f"rootfs.{record.fstype}").stat().st_size
        except (FileNotFoundError, msgspec.MsgspecError):
            # Also a record of another version: the image is made again.
            return None
        whole = (
            record.version == _RECORD_VERSION and record.digest == digest and record.size_bytes == size_bytes
        )
        return record if whole else None

    def image(self, record: ImageRecord, name: str) -> Image:
        """The public form of a record. Does not block."""
        return Image(
            name=name,
            digest=record.digest,
            config=record.config,
            rootfs=self._directory(record.digest) / f"rootfs.{record.fstype}",
            fstype=record.fstype,
            size_bytes=record.size_bytes,
            layers=record.layers,
            created=record.created,
            passwd=record.passwd,
            group=record.group,
        )

    def make(self, digest: str, fill: Callable[[Path], ImageRecord]) -> ImageRecord:
        """The record of an image, made by ``fill`` when it is not there: by one process, however many ask.

        Args:
            fill: Given an empty work directory, put ``rootfs.<fstype>`` into its ``image`` and return the record. Whatever else
                it leaves in the work directory is removed.

        Raises:
            DeadlineExceededError: Another process works on it longer than 15 minutes.
        Blocks: for that, and for another process that makes the same image.
        """
        self._prepare_directories()
        with self._locked(_hex(digest)):
            self.sweep(holding=_hex(digest))
            record = self.load(digest)
            if record is not None:
                return record
            work = Path(tempfile.mkdtemp(prefix=f"{_hex(digest)}.", dir=self._root / "work"))
            with _removed_at_end(work):
                (work / "image").mkdir(mode=0o700)
                record = fill(work)
                # The tree goes before anything is synced, so that most of it never reaches the disk.
                for name in os.listdir(work):
                    if name != "image":
                        remove_tree(work / name)
                _sync(work / "image" / f"rootfs.{record.fstype}")
                _write_synced(work / "image" / _RECORD_NAME, msgspec.json.encode(record))
                _sync(work / "image")
                # A damaged one may lie there.
                remove_tree(self._directory(digest))
                os.rename(work / "image", self._directory(digest))
                _sync(self._root)
        return record

    def sweep(self, *, holding: str | None = None) -> None:
        """Remove what processes that died left behind. Blocks: for the removal.

        Args:
            holding: Digest's hexadecimal digits whose lock the caller has.
        """
        for name in _list(self._root / "work"):
            owner = name.partition(".")[0]
            if owner == holding:
                remove_tree(self._root / "work" / name)
                continue
            with self._try_locked(owner) as ours:
                if ours:
                    remove_tree(self._root / "work" / name)

    def set_name(self, name: str, digest: str) -> None:
        """Let ``name`` mean ``digest``, whatever it meant before. Blocks: for another process that changes names."""
        if self.names().get(name) != digest:
            self._change_names(lambda names: names.update({name: digest}))

    def names(self) -> dict[str, str]:
        """Digest by name; names of images that are gone included. Blocks: for one small read."""
        try:
            return dict(msgspec.json.decode((self._root / "names.json").read_bytes(), type=_Names).names)
        except FileNotFoundError:
            return {}
        except msgspec.MsgspecError as exc:
            raise ImageError(f"{self._root / 'names.json'} is damaged: {exc}; remove it") from exc

    def find(self, text: str) -> Image | None:
        """The image with that name, digest or beginning of a digest (12 digits or more). Blocks: for small reads."""
        names = self.names()
        digest = names.get(text) or names.get(normalise_name(text))
        if digest is not None:
            record = self.load(digest)
            name = text if text in names else normalise_name(text)
            return None if record is None else self.image(record, name)
        found = self._by_prefix(text.removeprefix("sha256:"))
        return None if found is None else self.image(found, _name_of(names, found.digest))

    def images(self) -> list[Image]:
        """Every image once for each of its names, sorted by name. Blocks: for small reads."""
        names = self.names()
        found: list[Image] = []
        for digest in self._digests():
            record = self.load(digest)
            if record is not None:
                own = [name for name, other in names.items() if other == digest] or [""]
                found.extend(self.image(record, name) for name in own)
        return sorted(found, key=lambda image: (image.name, image.digest))

    def remove(self, text: str) -> None:
        """Take a name away; with its last name, or by digest, the image itself goes too.

        A running sandbox keeps the file that it has open.

        Raises:
            NotFoundError: No such image.
        Blocks: for another process that works on it.
        """
        image = self.find(text)
        if image is None:
            raise self.unknown(text)
        by_name = image.name in (text, normalise_name(text))

        def forget(names: dict[str, str]) -> bool:
            for name in [
                n for n, d in names.items() if d == image.digest and (not by_name or n == image.name)
            ]:
                del names[name]
            return image.digest not in names.values()

        if self._change_names(forget):
            with self._locked(_hex(image.digest)):
                doomed = Path(tempfile.mkdtemp(prefix=f"{_hex(image.digest)}.", dir=self._root / "work"))
                with _removed_at_end(doomed):
                    # First out of sight, in one step.
                    os.rename(self._directory(image.digest), doomed / "image")

    def unknown(self, text: str) -> NotFoundError:
        """The error for a reference that names nothing. Blocks: for one small read."""
        known = sorted(self.names())
        return NotFoundError(
            f"image {text!r} is neither an existing path nor a stored image; "
            + (f"stored are {', '.join(known[:20])}" if known else "none is stored")
            + "; a layout is named by oci:PATH, an archive by oci-archive:PATH or docker-archive:PATH"
        )

    def _by_prefix(self, prefix: str) -> ImageRecord | None:
        if len(prefix) < _MIN_PREFIX or not set(prefix) <= _HEX:
            return None
        found = [digest for digest in self._digests() if _hex(digest).startswith(prefix)]
        return self.load(found[0]) if len(found) == 1 else None

    def _digests(self) -> list[str]:
        return [name.replace("-", ":", 1) for name in _list(self._root) if name.startswith("sha256-")]

    def _directory(self, digest: str) -> Path:
        return self._root / f"sha256-{_hex(digest)}"

    def _change_names(self, change: Callable[[dict[str, str]], _T]) -> _T:
        self._prepare_directories()
        with self._locked("names"):
            names = self.names()
            result = change(names)
            target = self._root / "names.json"
            fresh = self._root / "names.json.new"
            _write_synced(fresh, msgspec.json.encode(_Names(names=names)))
            os.rename(fresh, target)
            _sync(self._root)
        return result

    def _prepare_directories(self) -> None:
        try:
            # Unpacked trees have setuid programs: nobody else may come near them.
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("work", "locks"):
                (self._root / name).mkdir(mode=0o700, exist_ok=True)
            _spread_children(self._root / "work")
        except OSError as exc:
            raise HostError(
                f"{exc.filename or self._root} can't be made: {exc.strerror}",
                errno=exc.errno or 0,
                target=str(self._root),
            ) from exc

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        timeout_s = _LOCK_TIMEOUT_S * self._timeout_factor
        deadline = time.monotonic() + timeout_s
        while True:
            with self._try_locked(name) as ours:
                if ours:
                    yield
                    return
            # A blocking flock can't be given a deadline, and nothing tells of its release.
            if time.monotonic() > deadline:
                raise DeadlineExceededError(
                    f"another process holds {self._root / 'locks' / name} for more than {timeout_s:g} s",
                    deadline_s=timeout_s,
                    waited_s=timeout_s,
                )
            time.sleep(_LOCK_RETRY_S)

    @contextlib.contextmanager
    def _try_locked(self, name: str) -> Iterator[bool]:
        fd = os.open(self._root / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(fd)


@contextlib.contextmanager
def _removed_at_end(work: Path) -> Iterator[None]:
    """Remove ``work`` after the block; a failure of that does not hide the block's own."""
    try:
        yield
    except BaseException as exc:
        try:
            remove_tree(work)
        except HostError as cleanup:
            exc.add_note(f"{work} could not be removed: {cleanup}")
        raise
    remove_tree(work)


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _name_of(names: dict[str, str], digest: str) -> str:
    return min((name for name, other in names.items() if other == digest), default="")


def _list(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _spread_children(directory: Path) -> None:
    """Ask ext4 to put each subdirectory elsewhere on the disk (``chattr +T``).

    Without a journal it does not reuse inodes for some minutes and looks at each of them first: unpacking beside a
    tree that was just removed took 22 s instead of 1.2 s.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = bytearray(8)
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        value = int.from_bytes(flags, sys.byteorder)
        if not value & _FS_TOPDIR_FL:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, (value | _FS_TOPDIR_FL).to_bytes(8, sys.byteorder))
    except OSError as exc:
        # Only a hint, and most filesystems do not know it.
        _log.debug("no spreading of directories", extra={"target": str(directory), "errno": exc.errno})
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
