"""One blob into one file, by one process at a time, from where the last one stopped."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Protocol

from casemate.errors import ImageError, RegistryError, ResourceExhaustedError
from casemate.images import documents
from casemate.images.disk import locked, typed_errors, write_all
from casemate.images.documents import Descriptor
from casemate.images.registry.client import RegistryClient
from casemate.observe import failpoints

__all__ = ["Parts", "download_blob"]

_CHUNK_BYTES = 1 << 20
_REPORT_S = 0.05
_TRIES = 5
_BACK_OFF_S = 0.2
_MAX_BACK_OFF_S = 5.0
_WAIT_S = 6 * 3600.0
_LATER = (408, 425, 429, 500, 502, 503, 504)


class Parts(Protocol):
    """Where blobs lie until their image is stored."""

    def part(self, hexadecimal: str) -> Path:
        """Path for the blob with that digest; its directory exists. The file is its own lock."""


def download_blob(
    client: RegistryClient,
    parts: Parts,
    blob: Descriptor,
    target: Path,
    report: Callable[[int], None],
    *,
    reference: str,
    timeout_factor: float = 1.0,
) -> None:
    """Bring ``blob`` to ``target``, a second name of a file in ``parts`` that stays until the image is stored.

    A connection that breaks is made again up to five times in a row without a byte, with a pause that grows to 5 s; what had come is
    kept, also for the next call, and hashed again before more is added.

    Args:
        report: Told about every 50 ms how many bytes are there.

    Raises:
        ImageError: More or other bytes than the descriptor says; nothing is kept.
        RegistryError, NotFoundError: The registry does not give it.
        ResourceExhaustedError: The disk is full; nothing is kept.
        HostError: The cache can't be written.
    Blocks: for the download, and for another process that brings the same blob.
    """
    part = parts.part(documents.digest_hex(blob.digest, reference=reference))
    with (
        locked(part, timeout_s=_WAIT_S, waiting=lambda: report(0)) as fd,
        os.fdopen(fd, "r+b", buffering=0, closefd=False) as file,
    ):
        try:
            failpoints.hit("image.download")
            _Download(client, blob, part, file, report, reference, timeout_factor).run()
            with typed_errors(part):
                os.link(part, target)
        except (ImageError, ResourceExhaustedError):
            # Wrong content is of no use to the next try, and a full disk is wanted by others.
            part.unlink(missing_ok=True)
            raise


class _Download:
    """A blob on its way into a file."""

    __slots__ = (
        "_blob",
        "_client",
        "_done_bytes",
        "_factor",
        "_file",
        "_hash",
        "_part",
        "_reference",
        "_report",
        "_told_at",
    )

    def __init__(
        self,
        client: RegistryClient,
        blob: Descriptor,
        part: Path,
        file: FileIO,
        report: Callable[[int], None],
        reference: str,
        timeout_factor: float,
    ) -> None:
        self._factor = timeout_factor
        self._client = client
        self._blob = blob
        self._part = part
        self._file = file
        self._report = report
        self._reference = reference
        self._hash = hashlib.sha256()
        self._done_bytes = 0
        self._told_at = 0.0

    def run(self) -> None:
        self._take_up()
        resumed = self._done_bytes > 0
        self._fill()
        # A part may have been damaged where it lay, by a crash of the host: one whole download more tells.
        if not self._is_right() and resumed:
            self._start_again()
            self._fill()
        if not self._is_right():
            raise self._error(f"is sha256:{self._hash.hexdigest()}")
        self._report(self._done_bytes)

    def _is_right(self) -> bool:
        return f"sha256:{self._hash.hexdigest()}" == self._blob.digest

    def _take_up(self) -> None:
        """Hash what is there."""
        with typed_errors(self._part):
            while data := self._file.read(_CHUNK_BYTES):
                self._hash.update(data)
                self._done_bytes += len(data)
        if self._done_bytes > self._blob.size:
            self._start_again()

    def _start_again(self) -> None:
        with typed_errors(self._part):
            self._file.seek(0)
            self._file.truncate()
        self._hash = hashlib.sha256()
        self._done_bytes = 0

    def _fill(self) -> None:
        failed = 0
        while self._done_bytes < self._blob.size:
            before = self._done_bytes
            try:
                self._receive()
                if self._done_bytes >= self._blob.size:
                    return
                error = RegistryError(
                    f"blob {self._blob.digest} of image {self._reference!r} is cut short: "
                    f"{self._done_bytes} of {self._blob.size} bytes came"
                )
            except RegistryError as exc:
                if exc.status and exc.status not in _LATER:
                    raise
                error = exc
            failed = failed + 1 if self._done_bytes <= before else 1
            if failed >= _TRIES:
                error.add_note(f"{self._done_bytes} bytes are kept; the next pull goes on from there")
                raise error
            # Many clients of one registry that came back must not ask it all at once.
            pause_s = min(_BACK_OFF_S * 2**failed, _MAX_BACK_OFF_S) * self._factor
            time.sleep(pause_s * random.uniform(0.5, 1.0))

    def _receive(self) -> None:
        answer, start_bytes = self._client.open_blob(self._blob.digest, self._done_bytes)
        with answer:
            if start_bytes != self._done_bytes:
                self._start_again()
            while data := answer.read_some(_CHUNK_BYTES):
                if self._done_bytes + len(data) > self._blob.size:
                    raise self._error(f"has more than the {self._blob.size} bytes of its descriptor")
                with typed_errors(self._part):
                    write_all(self._file, data)
                self._hash.update(data)
                self._done_bytes += len(data)
                now = time.monotonic()
                if now - self._told_at >= _REPORT_S:
                    self._told_at = now
                    self._report(self._done_bytes)

    def _error(self, what: str) -> ImageError:
        return ImageError(
            f"blob {self._blob.digest} of image {self._reference!r} {what}",
            reference=self._reference,
            digest=self._blob.digest,
        )
