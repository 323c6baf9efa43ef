"""QEMU on this host: where it is and which version. The answer is kept on disk, since asking costs a process."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from casemate.errors import HypervisorError, NotFoundError, UnsupportedError
from casemate.host import kept

__all__ = ["MIN_MAJOR", "QemuBinary", "find_qemu", "parse_version"]

MIN_MAJOR = 5
_VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)")
_ASK_S = 10.0
_CURE = "install QEMU (Debian and Ubuntu: qemu-system-x86, Fedora: qemu-system-x86-core), or give its path"


class QemuBinary(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU binary: its absolute ``path`` and ``version``."""

    path: str
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        """``7.2.22``."""
        return ".".join(str(part) for part in self.version)


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str
    size_bytes: int
    modified_ns: int
    version: tuple[int, int, int]


class _Cache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    entries: tuple[_Entry, ...] = ()


def parse_version(text: str) -> tuple[int, int, int]:
    """The version in what ``--version`` prints. Raises: HypervisorError when it holds none."""
    match = _VERSION.search(text)
    if match is None:
        raise HypervisorError(f"no version is in what QEMU printed: {text[:200]!r}")
    return int(match[1]), int(match[2]), int(match[3])


def find_qemu(
    name: str,
    *,
    cache_root: Path,
    search_path: str | None = None,
    ask: Callable[[str], str] | None = None,
) -> QemuBinary:
    """The QEMU called ``name`` (a path, or a name looked up in ``search_path``), fit for use.

    Args:
        cache_root: Directory in which versions are kept, by path, size and time of change.
        search_path: Directories joined by ``:``; None: this process's PATH.
        ask: Gives what ``--version`` prints; for tests.

    Raises:
        NotFoundError: There is none; the text names the package.
        UnsupportedError: It is older than version 5.
        HypervisorError: It does not answer as QEMU does.
    Blocks: for a file read; the first time for a process, at most 10 s.
    """
    path = _locate(name, search_path)
    stat = os.stat(path)
    file = cache_root / "qemu-probe.json"
    cache = kept.load(file, _Cache) or _Cache()
    entries = cache.entries
    for entry in entries:
        if (entry.path, entry.size_bytes, entry.modified_ns) == (path, stat.st_size, stat.st_mtime_ns):
            return _gate(QemuBinary(path=path, version=entry.version))
    version = parse_version((ask or _ask)(path))
    entry = _Entry(path=path, size_bytes=stat.st_size, modified_ns=stat.st_mtime_ns, version=version)
    kept.store(file, _Cache(entries=(entry, *(e for e in entries if e.path != path))[:16]))
    return _gate(QemuBinary(path=path, version=version))


def check_version(version: tuple[int, int, int]) -> None:
    """Raise UnsupportedError for a QEMU before version 5."""
    if version[0] < MIN_MAJOR:
        text = ".".join(map(str, version))
        raise UnsupportedError(f"QEMU is version {text}, {MIN_MAJOR}.0 or later is needed", capability="qemu")


def _gate(qemu: QemuBinary) -> QemuBinary:
    check_version(qemu.version)
    return qemu


def _locate(name: str, search_path: str | None) -> str:
    if "/" in name:
        candidates = [os.path.abspath(name)]
    else:
        directories = (os.environ.get("PATH", os.defpath) if search_path is None else search_path).split(":")
        candidates = [
            os.path.join(os.path.abspath(directory), name) for directory in directories if directory
        ]
    for candidate in candidates:
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    where = candidates[0] if "/" in name else f"{name!r} in PATH"
    raise NotFoundError(f"no QEMU at {where}: {_CURE}")


def _ask(path: str) -> str:
    import subprocess  # only the first time with a binary: 6 ms to import

    try:
        run = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=False
        )
    except OSError as error:
        raise HypervisorError(f"{path} can't be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise HypervisorError(f"{path} --version did not end within {_ASK_S:.0f} s") from error
    output = run.stdout[:4096].decode("utf-8", "replace")
    if run.returncode != 0:
        tail = run.stderr[-400:].decode("utf-8", "replace").strip()
        raise HypervisorError(f"{path} --version ended with status {run.returncode}: {tail}")
    return output
