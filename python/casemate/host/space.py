"""Memory and disk that are free now."""

from __future__ import annotations

import os
import re
from pathlib import Path

from casemate.host.finding import Finding, read_text

__all__ = ["find_disk", "find_memory", "parse_meminfo"]

_MEMORY_NEEDED_MIB = 256
"""What the smallest sensible guest takes with its VMM."""
_CACHE_NEEDED_MIB = 512
"""A kernel with its package, and an image of moderate size."""


def parse_meminfo(text: str) -> dict[str, int]:
    """Names to KiB (pages for counts of huge pages) in the text of ``/proc/meminfo``."""
    return {name: int(value) for name, value in re.findall(r"^([^:\n]+):\s+(\d+)", text, re.MULTILINE)}


def find_memory(root: Path = Path("/")) -> Finding:
    """Memory that a guest could have now."""
    found = parse_meminfo(read_text(root / "proc/meminfo"))
    total_mib, free_mib = found.get("MemTotal", 0) // 1024, found.get("MemAvailable", 0) // 1024
    data = {
        "total_mib": total_mib,
        "available_mib": free_mib,
        "huge_pages": found.get("HugePages_Total", 0),
        "huge_pages_free": found.get("HugePages_Free", 0),
        "huge_page_kib": found.get("Hugepagesize", 0),
    }
    text = f"{free_mib} MiB of {total_mib} MiB are free"
    if free_mib < _MEMORY_NEEDED_MIB:
        return Finding(
            name="memory",
            state="no",
            text=f"{text}, {_MEMORY_NEEDED_MIB} MiB are needed",
            cure="end something else, or give the host more",
            needed=True,
            facts=data,
        )
    return Finding(name="memory", state="yes", text=text, needed=True, facts=data)


def find_disk(name: str, directory: Path, needed_mib: int = _CACHE_NEEDED_MIB) -> Finding:
    """Room below ``directory``, which need not be there yet, and whether this process may write there."""
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    data: dict[str, object] = {"path": str(directory)}
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        return Finding(
            name=name,
            state="no",
            text=f"{directory}: {there} can't be written by this user",
            cure="run as root, or choose another directory by CASEMATE_STATE_ROOT or CASEMATE_CACHE",
            needed=True,
            facts=data,
        )
    status = os.statvfs(there)
    free_mib = status.f_bavail * status.f_frsize >> 20
    data |= {"free_mib": free_mib, "total_mib": status.f_blocks * status.f_frsize >> 20}
    text = f"{directory}: {free_mib} MiB are free"
    if free_mib < needed_mib:
        return Finding(
            name=name,
            state="partly" if free_mib else "no",
            text=f"{text}, {needed_mib} MiB are sensible",
            cure="free some, or choose another directory by CASEMATE_STATE_ROOT or CASEMATE_CACHE",
            needed=True,
            facts=data,
        )
    return Finding(name=name, state="yes", text=text, needed=True, facts=data)
