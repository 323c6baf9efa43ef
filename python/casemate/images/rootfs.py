"""From an unpacked tree to one read-only filesystem file, the same bytes for the same tree."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

from casemate.errors import DeadlineExceededError, HostError, ResourceExhaustedError, UnsupportedError
from casemate.images.disk import typed_errors
from casemate.images.types import Filesystem

__all__ = ["choose_filesystem", "make_filesystem"]

_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TAIL_BYTES = 4096
_BLOCK_BYTES = 4096
_NAMESPACE = uuid.UUID("b0a3c1de-6d5c-4f0e-9d0b-7c6a5d1e4f10")
# A build time that no file's time exceeds: mkfs.erofs lowers later ones to it. 2100-01-01.
_BUILD_TIME = 4_102_444_800


def choose_filesystem(tools: Mapping[Filesystem, str | None] | None = None) -> tuple[Filesystem, str]:
    """The filesystem that this host can make, and the program for it. Does not block.

    Args:
        tools: Program by filesystem instead of a search; None for one that is missing.

    Raises:
        UnsupportedError: Neither can be made; the text names the packages.
    """
    if tools is None:
        tools = {"erofs": _find("mkfs.erofs"), "ext4": _find("mke2fs")}
    for fstype in ("erofs", "ext4"):
        program = tools.get(fstype)
        if program:
            return fstype, program
    raise UnsupportedError(
        "neither mkfs.erofs nor mke2fs is installed, so the image can't become a filesystem; install erofs-utils "
        "(Debian, Fedora: erofs-utils) or e2fsprogs",
        capability="mkfs.erofs",
    )


def make_filesystem(
    fstype: Filesystem, program: str, tree: Path, target: Path, *, digest: str, timeout_s: float
) -> int:
    """Make ``target`` from ``tree``, read-only; return its size in bytes. Not synced yet.

    Raises:
        HostError: The program failed; the text has the end of what it said.
        ResourceExhaustedError: The disk is full.
        DeadlineExceededError: It ran longer than ``timeout_s``.
    Blocks: about 4 s a GiB.
    """
    identity = uuid.uuid5(_NAMESPACE, digest)
    with typed_errors(target):
        # Here, because the programs do not say why they can't.
        target.touch()
    if fstype == "erofs":
        _make_erofs(program, tree, target, identity, timeout_s)
    else:
        _make_ext4(program, tree, target, identity, timeout_s)
    os.chmod(target, 0o444)
    return target.stat().st_size


def _make_erofs(program: str, tree: Path, target: Path, identity: uuid.UUID, timeout_s: float) -> None:
    # Extended inodes keep each file's own time, whatever the build time is. No compression: see docs/design/images.md.
    argv = [program, "--quiet", "-E", "force-inode-extended", "-U", str(identity), str(target), str(tree)]
    _run(argv, {"SOURCE_DATE_EPOCH": str(_BUILD_TIME)}, timeout_s)


def _make_ext4(program: str, tree: Path, target: Path, identity: uuid.UUID, timeout_s: float) -> None:
    debugfs = _find("debugfs", beside=program)
    if debugfs is None:
        raise UnsupportedError("debugfs is not installed; install e2fsprogs", capability="debugfs")
    data_bytes, inodes = _measure(tree)
    # Inode tables, bitmaps and directory blocks beside the data; the file has holes where they are unused.
    size_bytes = data_bytes + data_bytes // 32 + inodes * (256 + _BLOCK_BYTES // 8) + (16 << 20)
    blocks = size_bytes // _BLOCK_BYTES
    time = {"E2FSPROGS_FAKE_TIME": "1", "SOURCE_DATE_EPOCH": "1"}
    argv = [program, "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-m", "0", "-N", str(inodes + 64)]
    argv += ["-O", "^has_journal,^resize_inode", "-U", str(identity), "-d", str(tree)]
    argv += ["-E", f"hash_seed={identity},lazy_itable_init=0", str(target), str(blocks)]
    _run(argv, time, timeout_s)
    # mke2fs adds a directory that no image has, and leaves the root's owner and mode to itself.
    root = tree.stat()
    commands = [
        "rmdir lost+found",
        f"set_inode_field / mode 0{stat.S_IFDIR | stat.S_IMODE(root.st_mode):o}",
        f"set_inode_field / uid {root.st_uid}",
        f"set_inode_field / gid {root.st_gid}",
        f"set_inode_field / mtime @{int(root.st_mtime)}",
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".debugfs") as script:
        script.write("\n".join(commands) + "\n")
        script.flush()
        _run([debugfs, "-w", "-f", script.name, str(target)], time, timeout_s)


def _measure(tree: Path) -> tuple[int, int]:
    """Bytes in whole blocks, holes left out, and the number of inodes; links of one file count once."""
    seen: set[int] = set()
    data_bytes = 0
    pending = [str(tree)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
                data_bytes += -(-min(status.st_size, status.st_blocks * 512) // _BLOCK_BYTES) * _BLOCK_BYTES
                if entry.is_dir(follow_symlinks=False):
                    data_bytes += _BLOCK_BYTES
                    pending.append(entry.path)
    return data_bytes, len(seen) + 1


def _find(name: str, *, beside: str | None = None) -> str | None:
    if beside is not None:
        neighbour = Path(beside).parent / name
        if neighbour.is_file():
            return str(neighbour)
    # The administrator's directories are not on every user's PATH.
    return shutil.which(name) or shutil.which(name, path=_SEARCH_PATH)


def _run(argv: list[str], env: dict[str, str], timeout_s: float) -> None:
    name = Path(argv[0]).name
    # Into a file: a tree may have any number of names to complain of.
    with tempfile.TemporaryFile() as output:
        try:
            status = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=timeout_s,
                check=False,
                env={"PATH": _SEARCH_PATH, "LC_ALL": "C.UTF-8", **env},
            ).returncode
        except subprocess.TimeoutExpired as exc:
            raise DeadlineExceededError(
                f"{name} did not end within {timeout_s:g} s", deadline_s=timeout_s, waited_s=timeout_s
            ) from exc
        except OSError as exc:
            raise HostError(
                f"{argv[0]} can't be started: {exc.strerror}", errno=exc.errno or 0, target=argv[0]
            ) from exc
        if status == 0:
            return
        end = output.seek(0, os.SEEK_END)
        output.seek(max(0, end - _TAIL_BYTES))
        tail = output.read().decode(errors="replace").strip()
    text = f"{name} failed with status {status}: {tail or 'it said nothing'}"
    # The words of the C library, in the language that was set above; programs pass no errno on.
    if os.strerror(errno.ENOSPC) in tail or os.strerror(errno.EDQUOT) in tail:
        raise ResourceExhaustedError(text)
    raise HostError(text, target=argv[0])
