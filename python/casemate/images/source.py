"""An image where it lies, before it is unpacked: found, its documents checked, its layers still to be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from casemate.errors import HostError, ImageError
from casemate.images.types import ImageConfig, Phase

__all__ = ["Candidate", "DirectoryFiles", "Files", "LayerFile", "Plan", "Provided", "opened_file", "shifted"]


class LayerFile(msgspec.Struct, frozen=True, kw_only=True):
    """One layer, ready to be unpacked: ``digest`` of the file as it is, ``diff_id`` of the tar in it."""

    path: Path
    media_type: str
    digest: str
    diff_id: str
    size_bytes: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What unpacking an image needs, lowest layer first."""

    digest: str
    config: ImageConfig
    created: str
    layers: tuple[LayerFile, ...]


class Provided(msgspec.Struct, frozen=True, kw_only=True):
    """A member as a file of its own; ``digest`` where it was read for that anyway."""

    path: Path
    size_bytes: int
    digest: str | None = None


class Files(Protocol):
    """Members of a layout directory or of an archive, by relative name."""

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """Content of a member; None when it is not there."""

    def size_bytes(self, name: str) -> int | None:
        """Size of a member; None when it is not there."""

    def provide(self, name: str, directory: Path, report: Callable[[int], None]) -> Provided | None:
        """The member as a regular file, made in ``directory`` where it is not one; ``report`` takes bytes copied."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was found.

    Args:
        prepare: Give the plan; may write to the directory it is given and calls back with bytes copied and in all.
        phase: What ``prepare`` does, for progress.
        parts: Hexadecimal digests of the blobs that are kept outside that directory until the image is stored.
    """

    digest: str
    name: str
    prepare: Callable[[Path, Callable[[int, int], None]], Plan]
    phase: Phase = "extract"
    parts: tuple[str, ...] = ()


class DirectoryFiles:
    """The files of a layout directory."""

    __slots__ = ("_reference", "_root")

    def __init__(self, root: Path, *, reference: str) -> None:
        self._root = root
        self._reference = reference

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """Content of a file; None when it is not there. Raises ImageError when larger than ``max_bytes``."""
        with opened_file(self._root / name, reference=self._reference) as fd:
            if fd is None:
                return None
            size_bytes = os.fstat(fd).st_size
            if size_bytes > max_bytes:
                raise ImageError(
                    f"{name} of image {self._reference!r} has {size_bytes} bytes, at most {max_bytes} are expected",
                    reference=self._reference,
                )
            with os.fdopen(os.dup(fd), "rb") as file:
                return file.read(max_bytes + 1)

    def size_bytes(self, name: str) -> int | None:
        """Size of a file; None when it is not there."""
        with opened_file(self._root / name, reference=self._reference) as fd:
            return None if fd is None else os.fstat(fd).st_size

    def provide(self, name: str, directory: Path, report: Callable[[int], None]) -> Provided | None:
        """The file where it lies; nothing is copied."""
        size_bytes = self.size_bytes(name)
        return None if size_bytes is None else Provided(path=self._root / name, size_bytes=size_bytes)


@contextmanager
def opened_file(path: Path, *, reference: str) -> Iterator[int | None]:
    """A regular file's descriptor for the block; None when there is none. Does not block on a FIFO.

    Raises:
        ImageError: It is something else than a regular file.
        HostError: It can't be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    except OSError as exc:
        raise HostError(
            f"{path} can't be opened: {exc.strerror}", errno=exc.errno or 0, target=str(path)
        ) from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"{path} of image {reference!r} is not a regular file", reference=reference)
        yield fd
    finally:
        os.close(fd)


def shifted(report: Callable[[int, int], None], base_bytes: int, total_bytes: int) -> Callable[[int], None]:
    """A report for one part that starts at ``base_bytes`` of ``total_bytes``. Does not block."""

    def report_part(done_bytes: int) -> None:
        report(base_bytes + done_bytes, total_bytes)

    return report_part
