from __future__ import annotations

from pathlib import Path

import pytest

from casemate.host.cgroup import find_cgroup, read_cgroups

V1 = """\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,xattr,memory
34 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
"""
V2_BESIDE = "35 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def host(root: Path, mountinfo: str, controllers: str = "") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cgroup.controllers").write_text(controllers)
    return root


@pytest.mark.parametrize(
    ("mountinfo", "controllers", "version", "names"),
    [
        (V1, "", "v1", ("cpu", "cpuacct", "memory")),
        (V1 + V2_BESIDE, "", "hybrid", ("cpu", "cpuacct", "memory")),
        (V2, "cpuset cpu io memory pids\n", "v2", ("cpu", "cpuset", "io", "memory", "pids")),
        ("", "", "none", ()),
        ("torn line\n31 23 - cgroup2\n", "", "none", ()),
    ],
)
def test_cgroups_then_version_and_controllers_follow_the_mounts(
    mountinfo: str, controllers: str, version: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    found = read_cgroups(host(tmp_path, mountinfo, controllers))

    assert (found.version, found.controllers) == (version, names)


def test_cgroup_when_all_controllers_are_there_then_yes(tmp_path: Path) -> None:
    found = find_cgroup(host(tmp_path, V2, "cpuset cpu memory pids"))

    assert (found.state, found.cure) == ("yes", "")
    assert found.facts["version"] == "v2"


def test_cgroup_when_controllers_are_missing_then_they_are_named(tmp_path: Path) -> None:
    found = find_cgroup(host(tmp_path, V2, "cpu memory"))

    assert found.state == "partly"
    assert "not there: cpuset pids" in found.text
    assert found.cure


def test_cgroup_when_none_is_mounted_then_no_with_the_cure(tmp_path: Path) -> None:
    found = find_cgroup(host(tmp_path, ""))

    assert found.state == "no"
    assert "mount -t cgroup2" in found.cure
