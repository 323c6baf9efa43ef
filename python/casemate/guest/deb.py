"""Unpack a Debian package without installing it: by ``dpkg-deb``, or by ourselves where that is missing.

A ``.deb`` is an ``ar`` archive of ``debian-binary``, ``control.tar.*`` and ``data.tar.*``.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest import compression
from casemate.guest.command import run_command

__all__ = ["AR_MAGIC", "find_data_member", "unpack_deb"]

AR_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60
_MAX_DATA_BYTES = 2 << 30


def unpack_deb(package: Path, directory: Path, *, deadline_s: float) -> None:
    """Unpack the files of ``package`` below ``directory``.

    Raises:
        InvalidConfigError: Damaged or no Debian package.
        DeadlineExceededError: It took longer than ``deadline_s``.
    Blocks: for the unpacking, 1 to 3 s.
    """
    if shutil.which("dpkg-deb") is None:
        _unpack_by_ourselves(package, directory)
        return
    result = run_command(["dpkg-deb", "-x", str(package), str(directory)], deadline_s=deadline_s)
    if result.status != 0:
        raise InvalidConfigError(f"{package} can't be unpacked: {result.error_text}", path="kernel")


def _unpack_by_ourselves(package: Path, directory: Path) -> None:
    name, data = find_data_member(package.read_bytes(), path=str(package))
    content = data
    if name.endswith((".xz", ".gz")):
        mode = "r:xz" if name.endswith(".xz") else "r:gz"
    else:
        mode = "r:"
        if name.endswith(".zst"):
            content = compression.decompress(data, form="zstd", max_bytes=_MAX_DATA_BYTES)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode=mode) as archive:  # type: ignore[call-overload]
            archive.extractall(directory, filter="data")
    except (tarfile.TarError, EOFError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        raise InvalidConfigError(f"{package} can't be unpacked: {exc}", path="kernel") from exc


def find_data_member(archive: bytes, *, path: str) -> tuple[str, bytes]:
    """Name and content of the ``data.tar`` member of a package.

    Raises:
        InvalidConfigError: No Debian package, or cut short.
        UnsupportedError: Its files are compressed in a way that is not known.
    """
    if not archive.startswith(AR_MAGIC):
        raise InvalidConfigError(f"{path} is not a Debian package", path="kernel")
    position = len(AR_MAGIC)
    while position + _HEADER_BYTES <= len(archive):
        header = archive[position : position + _HEADER_BYTES]
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        try:
            size_bytes = int(header[48:58])
        except ValueError:
            raise InvalidConfigError(f"{path} is damaged at byte {position}", path="kernel") from None
        start = position + _HEADER_BYTES
        if name.startswith("data.tar"):
            if start + size_bytes > len(archive):
                raise InvalidConfigError(
                    f"{path} is cut short: {len(archive)} bytes, {start + size_bytes} expected", path="kernel"
                )
            if not name.endswith((".tar", ".xz", ".gz", ".zst")):
                raise UnsupportedError(f"{path} holds {name}, which can't be unpacked", capability=name)
            return name, archive[start : start + size_bytes]
        position = start + size_bytes + size_bytes % 2
    raise InvalidConfigError(f"{path} is damaged or cut short: it has no data.tar", path="kernel")
