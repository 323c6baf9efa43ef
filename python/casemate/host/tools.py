"""Programs of the host that casemate calls: where they are, which version, what goes without them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from casemate.host import kept
from casemate.host.finding import Finding

__all__ = ["TOOLS", "Tool", "find_tool", "parse_version"]

_ASK_S = 10.0
_FILE = "tool-versions.json"
_KEPT = 64
_VERSION = re.compile(r"(?<![\d.])(\d+(?:\.\d+)+[\w.+~-]*)")


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A program.

    Args:
        name: What it is called; looked up in PATH, then at ``elsewhere``.
        purpose: What it is for.
        without: What happens without it.
        packages: Where it comes from.
        arguments: Make it print its version.
        elsewhere: Paths outside PATH where distributions put it.
    """

    name: str
    purpose: str
    without: str
    packages: str
    arguments: tuple[str, ...] = ("--version",)
    elsewhere: tuple[str, ...] = ()


TOOLS = (
    Tool(
        name="mkfs.erofs",
        purpose="images as read-only file systems",
        without="ext4 takes its place",
        packages="erofs-utils",
    ),
    Tool(
        name="mkfs.ext4",
        purpose="file systems where there is no erofs",
        without="images need mkfs.erofs",
        packages="e2fsprogs",
        arguments=("-V",),
    ),
    Tool(
        name="virtiofsd",
        purpose="directories shared with a guest",
        without="no shared directories",
        packages="virtiofsd, or qemu-system-common",
        elsewhere=("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"),
    ),
    Tool(
        name="skopeo",
        purpose="images from registries",
        without="images come from layouts and archives alone",
        packages="skopeo",
    ),
    Tool(
        name="apt-get",
        purpose="fetching a guest kernel",
        without="a kernel of this host, or one given by its path",
        packages="apt",
    ),
    Tool(
        name="ip",
        purpose="looking at networks by hand",
        without="nothing is missing",
        packages="iproute2",
        arguments=("-Version",),
    ),
    Tool(
        name="nft",
        purpose="rules for what a guest may reach",
        without="no such rules",
        packages="nftables",
    ),
)


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str
    size_bytes: int
    modified_ns: int
    version: str


class _Cache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    entries: tuple[_Entry, ...] = ()


def parse_version(text: str) -> str:
    """The first dotted number in what a program printed; empty when there is none."""
    match = _VERSION.search(text)
    return match[1].rstrip(".") if match else ""


def find_tool(
    tool: Tool,
    *,
    cache_root: Path,
    search_path: str | None = None,
    ask: Callable[[str, tuple[str, ...]], str] | None = None,
) -> Finding:
    """Where ``tool`` is and its version; the version is kept until the program changes.

    Args:
        cache_root: Directory in which versions are kept, by path, size and time of change.
        search_path: Directories joined by ``:``; None: this process's PATH with those of the system's administration.
        ask: Gives what the program prints; for tests.

    Blocks: for file reads; the first time for a process, at most 10 s.
    """
    path = _locate(tool, search_path)
    if path is None:
        return Finding(
            name=f"tool.{tool.name}",
            state="no",
            text=f"{tool.name} is not installed ({tool.purpose}): {tool.without}",
            cure=f"install {tool.packages}",
        )
    version = _version(path, tool, cache_root / _FILE, ask or _ask)
    return Finding(
        name=f"tool.{tool.name}",
        state="yes",
        text=f"{path} {version or '(of unknown version)'}",
        facts={"path": path, "version": version, "purpose": tool.purpose},
    )


def _locate(tool: Tool, search_path: str | None) -> str | None:
    if search_path is None:
        # Users have no sbin in their PATH, but file system tools lie there.
        search_path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    found = shutil.which(tool.name, path=search_path)
    if found is not None:
        return found
    return next((path for path in tool.elsewhere if os.access(path, os.X_OK)), None)


def _version(path: str, tool: Tool, file: Path, ask: Callable[[str, tuple[str, ...]], str]) -> str:
    stat = os.stat(path)
    cache = kept.load(file, _Cache) or _Cache()
    for entry in cache.entries:
        if (entry.path, entry.size_bytes, entry.modified_ns) == (path, stat.st_size, stat.st_mtime_ns):
            return entry.version
    version = parse_version(ask(path, tool.arguments))
    if version:
        entry = _Entry(path=path, size_bytes=stat.st_size, modified_ns=stat.st_mtime_ns, version=version)
        others = [one for one in cache.entries if one.path != path]
        kept.store(file, _Cache(entries=(entry, *others)[:_KEPT]))
    return version


def _ask(path: str, arguments: tuple[str, ...]) -> str:
    import subprocess

    try:
        run = subprocess.run(
            [path, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # Some print it to stderr.
    return (run.stdout + run.stderr)[:4096].decode("utf-8", "replace")
