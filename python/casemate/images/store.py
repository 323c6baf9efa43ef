"""The unpacked images of this host: one directory an image, by digest, made whole or not at all.

::

    <cache_root>/images/sha256-<hex>/rootfs.erofs   read-only
                                     record.json
                       /names.json                  name → digest
                       /locks/<hex>, /locks/names   flock; never removed
                       /work/<hex>.<random>/        being made, or left by a process that died
                       /parts/<hex>                 a blob on its way from a registry; its own lock
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from casemate._core import remove_tree
from casemate.config.settings import Settings
from casemate.errors import ImageError, InvalidConfigError, NotFoundError
from casemate.images.disk import (
    list_directory,
    locked,
    removed_at_end,
    spread_children,
    sync,
    try_locked,
    typed_errors,
    write_synced,
)
from casemate.images.reference import normalise_name
from casemate.images.registry.name import parse_name
from casemate.images.types import Filesystem, Image, ImageConfig
from casemate.observe import failpoints
from casemate.observe.log import Log

__all__ = ["ImageRecord", "Store"]

_log = Log(__name__)

_RECORD_VERSION = 1
_RECORD_NAME = "record.json"
_NAMES_TIMEOUT_S = 60.0
_MAKE_TIMEOUT_S = 3600.0
_PART_KEPT_S = 7 * 86400.0
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

    __slots__ = ("_default_registry", "_root", "_timeout_factor")

    def __init__(self, settings: Settings) -> None:
        self._root = settings.cache_root / "images"
        self._timeout_factor = settings.timeout_factor
        self._default_registry = settings.default_registry

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

    def use(self, digest: str) -> ImageRecord | None:
        """As :meth:`load`, for somebody who is about to attach it: it counts as used now, and the collector leaves it alone.

        Blocks: for a small read, and for somebody who removes it just now.
        """
        if not self._directory(digest).is_dir():
            return None
        path = self._root / "locks" / _hex(digest)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(
                    locked(path, timeout_s=_NAMES_TIMEOUT_S * self._timeout_factor, shared=True)
                )
                os.utime(self._directory(digest) / _RECORD_NAME)
            except OSError as exc:
                # Who can't write can't collect either; what is not whole is told by the next line.
                if exc.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
                    raise
                _log.debug(
                    "use is not recorded", extra={"op": "image.use", "target": digest, "errno": exc.errno}
                )
            return self.load(digest)

    def used_at(self, digest: str) -> float:
        """When the image was last used, in seconds since 1970; 0 when it is gone. Blocks: for one small read."""
        directory = self._directory(digest)
        for path in (directory / _RECORD_NAME, directory):
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_mtime
        return 0.0

    def size_bytes(self, digest: str) -> int:
        """Bytes of the image's files, whole or not. Blocks: for small reads."""
        directory = self._directory(digest)
        return sum(
            (directory / name).stat().st_size for name in list_directory(directory) if name != _RECORD_NAME
        )

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

    def make(
        self,
        digest: str,
        fill: Callable[[Path], ImageRecord],
        *,
        waiting: Callable[[], None] | None = None,
    ) -> ImageRecord:
        """The record of an image, made by ``fill`` when it is not there: by one process, however many ask.

        Args:
            fill: Given an empty work directory, put ``rootfs.<fstype>`` into its ``image`` and return the record. Whatever else
                it leaves in the work directory is removed.
            waiting: Called every 50 ms while another process makes it; what it raises ends the wait.

        Raises:
            DeadlineExceededError: Another process works on it longer than an hour.
            ResourceExhaustedError, HostError: The disk is full, or can't be written.
        Blocks: for that, and for another process that makes the same image.
        """
        self._prepare_directories()
        with self._locked(_hex(digest), _MAKE_TIMEOUT_S, waiting):
            self.sweep(holding=_hex(digest))
            record = self.load(digest)
            return record if record is not None else self._make(digest, fill)

    def _make(self, digest: str, fill: Callable[[Path], ImageRecord]) -> ImageRecord:
        failpoints.hit("image.work")
        with typed_errors(self._root):
            work = Path(tempfile.mkdtemp(prefix=f"{_hex(digest)}.", dir=self._root / "work"))
        with removed_at_end(work):
            with typed_errors(work):
                (work / "image").mkdir(mode=0o700)
            record = fill(work)
            with typed_errors(work):
                # The tree goes before anything is synced, so that most of it never reaches the disk.
                for name in os.listdir(work):
                    if name != "image":
                        remove_tree(work / name)
                failpoints.hit("image.record")
                sync(work / "image" / f"rootfs.{record.fstype}")
                write_synced(work / "image" / _RECORD_NAME, msgspec.json.encode(record))
                sync(work / "image")
                # A damaged one may lie there.
                remove_tree(self._directory(digest))
                failpoints.hit("image.rename")
                os.rename(work / "image", self._directory(digest))
                failpoints.hit("image.renamed")
                sync(self._root)
        return record

    def sweep(self, *, holding: str | None = None) -> None:
        """Remove what processes that died left behind. Blocks: for the removal.

        Args:
            holding: Digest's hexadecimal digits whose lock the caller has.
        """
        for name in list_directory(self._root / "work"):
            owner = name.partition(".")[0]
            if owner == holding:
                remove_tree(self._root / "work" / name)
                continue
            with try_locked(self._root / "locks" / owner) as ours:
                if ours is not None:
                    remove_tree(self._root / "work" / name)
        self.remove_parts(before=time.time() - _PART_KEPT_S)

    def part(self, hexadecimal: str) -> Path:
        """Where a blob lies on its way from a registry; the file is its own lock. Blocks: for making its directory."""
        self._prepare_directories("parts")
        return self._root / "parts" / hexadecimal

    def remove_parts(
        self, *, only: Iterable[str] | None = None, before: float | None = None, dry_run: bool = False
    ) -> int:
        """Remove parts that nobody works on; give their bytes.

        Args:
            only: These, by hexadecimal digits; None: all.
            before: Those that were written last before that time.
        Blocks: for the removal.
        """
        removed_bytes = 0
        failpoints.hit("image.parts")
        for name in list_directory(self._root / "parts") if only is None else only:
            path = self._root / "parts" / name
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if before is not None and status.st_mtime >= before:
                continue
            with try_locked(path) as ours:
                if ours is not None:
                    removed_bytes += status.st_size
                    if not dry_run:
                        path.unlink()
        return removed_bytes

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
        for name in self._spellings(text):
            if name in names:
                record = self.load(names[name])
                return None if record is None else self.image(record, name)
        found = self._by_prefix(text.removeprefix("sha256:"))
        return None if found is None else self.image(found, _name_of(names, found.digest))

    def images(self) -> list[Image]:
        """Every image once for each of its names, sorted by name. Blocks: for small reads."""
        names = self.names()
        found: list[Image] = []
        for digest in self.digests():
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
            raise NotFoundError(f"image {text!r} is not stored; {self._stored_text()}")
        by_name = image.name in self._spellings(text)

        def forget(names: dict[str, str]) -> None:
            for name in [
                n for n, d in names.items() if d == image.digest and (not by_name or n == image.name)
            ]:
                del names[name]
            if image.digest not in names.values():
                self._remove_directory(image.digest)

        with self._locked(_hex(image.digest), _MAKE_TIMEOUT_S):
            self._change_names(forget)

    def collect(self, digest: str, *, used_before: float) -> bool:
        """Remove an image with all its names when nobody used it since ``used_before``; whether it was removed.

        Blocks: for the removal. Raises: HostError.
        """
        path = self._root / "locks" / _hex(digest)
        with typed_errors(self._root), try_locked(path) as ours:
            # Who is about to attach it holds the lock for a moment, and its time is new afterwards.
            if ours is None or not 0 < self.used_at(digest) < used_before:
                return False
            self._remove_directory(digest)

            def forget(names: dict[str, str]) -> None:
                for name in [name for name, other in names.items() if other == digest]:
                    del names[name]

            self._change_names(forget)
        return True

    def _remove_directory(self, digest: str) -> None:
        """Remove an image, whose lock the caller has. It needs no room: a full disk is when people remove."""
        doomed = self._root / "work" / f"{_hex(digest)}.{os.urandom(4).hex()}"
        # First out of sight, in one step.
        failpoints.hit("image.remove")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._directory(digest), doomed)
        failpoints.hit("image.removed")
        remove_tree(doomed)

    def unknown(self, text: str) -> NotFoundError:
        """The error for a reference that names nothing. Blocks: for one small read."""
        whole = self._canonical(text)
        cure = (
            "a layout is named by oci:PATH, an archive by oci-archive:PATH or docker-archive:PATH"
            if whole is None
            else f"to fetch {whole} from its registry, say docker://{text}"
        )
        return NotFoundError(
            f"image {text!r} is neither an existing path nor a stored image; {self._stored_text()}; {cure}"
        )

    def _stored_text(self) -> str:
        known = sorted(self.names())
        return f"stored are {', '.join(known[:20])}" if known else "none is stored"

    def _spellings(self, text: str) -> tuple[str, ...]:
        """The names that ``text`` can mean, nearest first."""
        whole = self._canonical(text)
        return tuple(dict.fromkeys((text, normalise_name(text), *(() if whole is None else (whole,)))))

    def _canonical(self, text: str) -> str | None:
        """The whole name in a registry, if ``text`` can be one."""
        bare = text.removeprefix("sha256:")
        if len(bare) >= _MIN_PREFIX and set(bare) <= _HEX:
            return None
        try:
            return parse_name(text, default_registry=self._default_registry).text
        except InvalidConfigError:
            return None

    def _by_prefix(self, prefix: str) -> ImageRecord | None:
        if len(prefix) < _MIN_PREFIX or not set(prefix) <= _HEX:
            return None
        found = [digest for digest in self.digests() if _hex(digest).startswith(prefix)]
        return self.load(found[0]) if len(found) == 1 else None

    def digests(self) -> list[str]:
        """Digests of all that lies here as an image, damaged ones included. Blocks: for one small read."""
        return [
            name.replace("-", ":", 1) for name in list_directory(self._root) if name.startswith("sha256-")
        ]

    def _directory(self, digest: str) -> Path:
        return self._root / f"sha256-{_hex(digest)}"

    def _change_names(self, change: Callable[[dict[str, str]], _T]) -> _T:
        with typed_errors(self._root):
            self._prepare_directories()
            with self._locked("names", _NAMES_TIMEOUT_S):
                names = self.names()
                result = change(names)
                fresh = self._root / "names.json.new"
                failpoints.hit("image.names")
                try:
                    write_synced(fresh, msgspec.json.encode(_Names(names=names)))
                except OSError:
                    fresh.unlink(missing_ok=True)
                    raise
                os.rename(fresh, self._root / "names.json")
                failpoints.hit("image.named")
                sync(self._root)
        return result

    def _prepare_directories(self, *more: str) -> None:
        with typed_errors(self._root):
            # Unpacked trees have setuid programs: nobody else may come near them.
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("work", "locks", *more):
                (self._root / name).mkdir(mode=0o700, exist_ok=True)
            spread_children(self._root / "work")

    def _locked(
        self, name: str, timeout_s: float, waiting: Callable[[], None] | None = None
    ) -> contextlib.AbstractContextManager[int]:
        path = self._root / "locks" / name
        return locked(path, timeout_s=timeout_s * self._timeout_factor, waiting=waiting)


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _name_of(names: dict[str, str], digest: str) -> str:
    return min((name for name, other in names.items() if other == digest), default="")
