"""Images in one tar file: an OCI layout, or what ``docker save`` writes. Members are read by name, never extracted by it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from casemate.errors import ImageError, NotFoundError
from casemate.images import documents
from casemate.images.disk import typed_errors, write_all
from casemate.images.documents import ConfigDocument, DockerArchiveItem
from casemate.images.reference import default_name, normalise_name
from casemate.images.source import Candidate, Files, LayerFile, Plan, Provided, opened_file, shifted

__all__ = ["DOCKER_MANIFEST", "ArchiveFiles", "find_in_docker_archive", "opened_archive"]

DOCKER_MANIFEST = "manifest.json"
_MAX_MEMBERS = 100_000
_MAX_MEMBER_BYTES = 64 << 30
_MAX_LINKS = 8
_COPY_BYTES = 1 << 20
# The largest single read that tarfile makes is an extension header.
_MAX_READ_BYTES = 4 << 20
_DAMAGE = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    ValueError,
    OverflowError,
    RecursionError,
)


class _BoundedReader:
    """Keeps tarfile from taking as much memory as a header asks for."""

    __slots__ = ("_file",)

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class ArchiveFiles:
    """Members of an open archive."""

    __slots__ = ("_members", "_reference", "_tar")

    def __init__(self, tar: tarfile.TarFile, *, reference: str) -> None:
        self._tar = tar
        self._reference = reference
        self._members = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """Content of a member; None when it is not there. Raises ImageError when larger than ``max_bytes``."""
        member = self._member(name)
        if member is None:
            return None
        if member.size > max_bytes:
            raise self._error(
                f"has a member {name!r} of {member.size} bytes, at most {max_bytes} are expected"
            )
        output = io.BytesIO()
        self._copy(member, output.write)
        return output.getvalue()

    def size_bytes(self, name: str) -> int | None:
        """Size of a member; None when it is not there."""
        member = self._member(name)
        return None if member is None else member.size

    def provide(self, name: str, directory: Path, report: Callable[[int], None]) -> Provided | None:
        """The member, copied to a file in ``directory`` and hashed on the way."""
        member = self._member(name)
        if member is None:
            return None
        path = directory / f"{member.offset_data}.blob"
        digest = hashlib.sha256()
        done_bytes = 0
        # A layer that an image has twice is copied once more: rare, and the digest is needed anyway.
        with typed_errors(path):
            file = path.open("wb", buffering=0)
        with file:

            def write(data: bytes) -> None:
                nonlocal done_bytes
                digest.update(data)
                with typed_errors(path):
                    write_all(file, data)
                done_bytes += len(data)
                report(done_bytes)

            self._copy(member, write)
        return Provided(path=path, size_bytes=member.size, digest=f"sha256:{digest.hexdigest()}")

    def _index(self) -> dict[str, tarfile.TarInfo]:
        members: dict[str, tarfile.TarInfo] = {}
        end = -1
        try:
            for count, member in enumerate(self._tar):
                if count >= _MAX_MEMBERS:
                    raise self._error(f"has more than {_MAX_MEMBERS} members")
                # A negative size would lead back to where we were.
                if member.size < 0 or member.offset <= end:
                    raise self._error("is damaged: a member of negative size")
                end = member.offset
                members[self._normalise(member.name)] = member
        except _DAMAGE as exc:
            raise self._error(f"is cut short or damaged: {exc}") from exc
        return members

    def _normalise(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise self._error(f"has a member {name!r} that leaves the archive")
        return posixpath.normpath(name)

    def _member(self, name: str) -> tarfile.TarInfo | None:
        """The regular file that ``name`` is or links to: ``docker save`` links equal layers."""
        name = self._normalise(name)
        for _ in range(_MAX_LINKS):
            member = self._members.get(name)
            if member is None:
                return None
            if member.issym():
                # Links go up from their own directory; what they name must be a member.
                name = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                name = posixpath.normpath(member.linkname)
            elif member.isreg() and not member.issparse() and member.size <= _MAX_MEMBER_BYTES:
                return member
            else:
                break
        raise self._error(f"has a member {name!r} that is not a regular file")

    def _copy(self, member: tarfile.TarInfo, write: Callable[[bytes], object]) -> None:
        try:
            file = self._tar.extractfile(member)
            left_bytes = member.size
            while file is not None and left_bytes > 0:
                data = file.read(min(_COPY_BYTES, left_bytes))
                if not data:
                    break
                left_bytes -= len(data)
                write(data)
        except _DAMAGE as exc:
            raise self._error(f"is cut short or damaged at member {member.name!r}: {exc}") from exc
        if left_bytes:
            raise self._error(f"is cut short at member {member.name!r}")

    def _error(self, what: str) -> ImageError:
        return ImageError(f"image archive {self._reference!r} {what}", reference=self._reference)


@contextlib.contextmanager
def opened_archive(path: Path, *, reference: str) -> Iterator[ArchiveFiles]:
    """The members of a tar file, plain or gzip, for the block.

    Raises:
        NotFoundError: There is no such file.
        ImageError: It is not a tar file, or damaged.
    Blocks: for a walk over the headers; for a gzip file, for its decompression.
    """
    with opened_file(path, reference=reference) as fd:
        if fd is None:
            raise NotFoundError(f"image archive {str(path)!r} does not exist")
        with os.fdopen(os.dup(fd), "rb") as raw:
            start = raw.read(4)
            raw.seek(0)
            if start == b"\x28\xb5\x2f\xfd" or start == b"\xfd7zX" or start[:3] == b"BZh":
                raise ImageError(
                    f"image archive {reference!r} is compressed with something else than gzip: decompress it first",
                    reference=reference,
                )
            file: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if start[:2] == b"\x1f\x8b" else raw
            bounded = cast(IO[bytes], _BoundedReader(file))
            with contextlib.ExitStack() as stack:
                try:
                    tar = stack.enter_context(tarfile.open(fileobj=bounded, mode="r:"))
                except _DAMAGE as exc:
                    raise ImageError(
                        f"image archive {reference!r} is not a tar file, or cut short: {exc}",
                        reference=reference,
                    ) from exc
                yield ArchiveFiles(tar, reference=reference)


def find_in_docker_archive(
    files: Files, *, path: str, tag: str | None, reference: str, architecture: str
) -> Candidate:
    """Find the image ``tag`` (or the only one) of a ``docker save`` archive, its configuration read and checked.

    Raises:
        NotFoundError: No such tag, or several images and no tag.
        ImageError: The archive is damaged, or for another platform.
    Blocks: for small reads.
    """
    data = files.read(DOCKER_MANIFEST, max_bytes=documents.MAX_DOCUMENT_BYTES)
    if data is None:
        raise ImageError(
            f"image archive {reference!r} has no {DOCKER_MANIFEST}: it is not from docker save",
            reference=reference,
        )
    items = documents.decode(data, tuple[DockerArchiveItem, ...], what=DOCKER_MANIFEST, reference=reference)
    item, name = _choose(items, path=path, tag=tag, reference=reference)
    config = files.read(item.config, max_bytes=documents.MAX_DOCUMENT_BYTES)
    if config is None:
        raise ImageError(
            f"configuration {item.config!r} of image {reference!r} is missing", reference=reference
        )
    config_digest = documents.digest_of(config)
    stem = posixpath.basename(item.config).removesuffix(".json")
    if len(stem) == 64 and f"sha256:{stem}" != config_digest:
        raise ImageError(
            f"configuration {item.config!r} of image {reference!r} is damaged: its digest is {config_digest}",
            reference=reference,
            digest=f"sha256:{stem}",
        )
    document = documents.decode(
        config, ConfigDocument, what="configuration", reference=reference, digest=config_digest
    )
    documents.check_configuration(
        document, len(item.layers), architecture=architecture, reference=reference, digest=config_digest
    )
    digest = documents.canonical_digest(config_digest, document.rootfs.diff_ids)

    def prepare(directory: Path, report: Callable[[int, int], None]) -> Plan:
        return _prepare(files, digest, item, document, directory, report, reference=reference)

    return Candidate(digest=digest, name=default_name(path, name), prepare=prepare)


def _choose(
    items: tuple[DockerArchiveItem, ...], *, path: str, tag: str | None, reference: str
) -> tuple[DockerArchiveItem, str | None]:
    if not items:
        raise ImageError(f"image archive {reference!r} has no image", reference=reference)
    named = [(name, item) for item in items for name in item.repo_tags or ()]
    if tag is not None:
        for name, item in named:
            if normalise_name(tag) == name or tag == name.rpartition(":")[2]:
                return item, name
        known = ", ".join(name for name, _ in named[:20]) or "one without a name: leave the tag out"
        raise NotFoundError(f"{path} has no image {tag!r}; it has {known}")
    if len(items) > 1:
        known = ", ".join(name for name, _ in named[:20]) or "them: they have no tags"
        raise NotFoundError(f"{path} has {len(items)} images; name one of {known}")
    return items[0], named[0][0] if named else None


def _prepare(
    files: Files,
    digest: str,
    item: DockerArchiveItem,
    document: ConfigDocument,
    directory: Path,
    report: Callable[[int, int], None],
    *,
    reference: str,
) -> Plan:
    sizes = []
    for name in item.layers:
        size_bytes = files.size_bytes(name)
        if size_bytes is None:
            raise ImageError(f"layer {name!r} of image {reference!r} is missing", reference=reference)
        sizes.append(size_bytes)
    layers = []
    done_bytes = 0
    for name, diff_id in zip(item.layers, document.rootfs.diff_ids, strict=True):
        provided = files.provide(name, directory, shifted(report, done_bytes, sum(sizes)))
        if provided is None or provided.digest is None:
            raise ImageError(f"layer {name!r} of image {reference!r} is missing", reference=reference)
        done_bytes += provided.size_bytes
        # The archive names no digests of layers; what counts is the diff_id.
        layers.append(
            LayerFile(
                path=provided.path,
                media_type="",
                digest=provided.digest,
                diff_id=diff_id,
                size_bytes=provided.size_bytes,
            )
        )
    return Plan(
        digest=digest, config=document.image_config(), created=document.created or "", layers=tuple(layers)
    )
