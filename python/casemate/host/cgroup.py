"""Which cgroup hierarchies the host has, with which controllers, and whether this process may use them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from casemate.host.finding import Finding, read_text

__all__ = ["CgroupFacts", "find_cgroup", "read_cgroups"]

_WANTED = ("cpu", "cpuset", "memory", "pids")
_FIRST_CONTROLLERS = frozenset(
    {
        "blkio",
        "cpu",
        "cpuacct",
        "cpuset",
        "debug",
        "devices",
        "freezer",
        "hugetlb",
        "memory",
        "misc",
        "net_cls",
        "net_prio",
        "perf_event",
        "pids",
        "rdma",
    }
)


class CgroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The host's cgroups.

    Args:
        version: ``v1``, ``v2``, ``hybrid`` (controllers on v1, a v2 hierarchy beside them) or ``none``.
        controllers: Those that can be used, by name.
        mounts: Each hierarchy's mount point to its controllers; v2 has one.
    """

    version: str
    controllers: tuple[str, ...]
    mounts: dict[str, tuple[str, ...]]


def read_cgroups(root: Path = Path("/")) -> CgroupFacts:
    """What ``mountinfo`` tells of cgroups. Blocks: for file reads."""
    first: dict[str, tuple[str, ...]] = {}
    second: dict[str, tuple[str, ...]] = {}
    for line in read_text(root / "proc/self/mountinfo", 1 << 20).splitlines():
        head, dash, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split()
        if not dash or len(fields) < 5 or len(kind) < 3:
            continue
        point = fields[4]
        if kind[0] == "cgroup2":
            second[point] = tuple(read_text(root / point.lstrip("/") / "cgroup.controllers").split())
        elif kind[0] == "cgroup":
            # Among options such as rw, xattr and name=systemd.
            first[point] = tuple(word for word in kind[-1].split(",") if word in _FIRST_CONTROLLERS)
    has_first = any(first.values())
    version = "hybrid" if has_first and second else "v1" if has_first or first else "v2" if second else "none"
    mounts = first | second
    names = sorted({name for names in mounts.values() for name in names})
    return CgroupFacts(version=version, controllers=tuple(names), mounts=mounts)


def find_cgroup(root: Path = Path("/")) -> Finding:
    """Version, controllers, and whether groups can be made."""
    facts = read_cgroups(root)
    data = {"version": facts.version, "controllers": facts.controllers, "mounts": facts.mounts}
    if facts.version == "none":
        return Finding(
            name="cgroup",
            state="no",
            text="no cgroup hierarchy is mounted: a sandbox's use of the host can't be limited",
            cure="mount -t cgroup2 none /sys/fs/cgroup",
            facts=data,
        )
    text = f"{facts.version}: {' '.join(facts.controllers) or 'no controllers'}"
    missing = [name for name in _WANTED if name not in facts.controllers]
    if missing:
        return Finding(
            name="cgroup",
            state="partly",
            text=f"{text}; not there: {' '.join(missing)}",
            cure="turn them on in the kernel's command line or, in a container, delegate them to it",
            facts=data,
        )
    shut = [
        point
        for point, names in facts.mounts.items()
        if set(names) & set(_WANTED) and not os.access(root / point.lstrip("/"), os.W_OK)
    ]
    if shut:
        return Finding(
            name="cgroup",
            state="partly",
            text=f"{text}; not writable: {' '.join(shut)}",
            cure="run as root, or have a group delegated",
            facts=data,
        )
    return Finding(name="cgroup", state="yes", text=text, facts=data)
